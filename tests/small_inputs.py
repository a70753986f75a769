"""Small inputs of each kind, and their books."""

import io
import json
import tarfile

from aimv2_jax.data.inputs import read
from aimv2_jax.data.inputs.samples import Damage, Sample


def picture(number, num_bytes=700):
    """Bytes that stand for a picture: readers do not look into them."""
    return b"\xff\xd8" + f"picture {number} ".encode() * (num_bytes // 10 + number % 7)


def pair(number, stem="{:09d}", suffix="jpg"):
    """The members of one pair, as img2dataset names them."""
    key = stem.format(number)
    tree = {"key": key, "caption": f"alt {number}", "synthetic": f"A picture, the {number}th."}
    return {
        f"{key}.{suffix}": picture(number),
        f"{key}.txt": f"text {number}".encode(),
        f"{key}.json": json.dumps(tree).encode(),
    }


def pairs(count, **options):
    return {name: data for number in range(count) for name, data in pair(number, **options).items()}


def packed(members, format=tarfile.USTAR_FORMAT):
    """The tar of `members`, a dict or (name, data) items."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header_offsets(data):
    """name -> where its header begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member.offset for member in tar}


def books(shard):
    """(samples, damages) of `shard`."""
    items = list(read.read(shard))
    samples = [item for item in items if isinstance(item, Sample)]
    damages = [item for item in items if isinstance(item, Damage)]
    assert len(samples) + len(damages) == len(items)
    assert all(damage.samples >= 0 and damage.num_bytes >= 0 for damage in damages)
    return samples, damages


def lost(damages):
    return sum(damage.samples for damage in damages)
