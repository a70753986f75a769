"""Small inputs of each format, and the samples and bad inputs that readers return for them."""

import io
import json
import tarfile

from aimv2_jax.prepare.inputs import reader
from aimv2_jax.prepare.inputs.samples import BadInput, Sample


def image_bytes(number, num_bytes=700):
    """Placeholder bytes for an image; readers do not decode them."""
    return b"\xff\xd8" + f"picture {number} ".encode() * (num_bytes // 10 + number % 7)


def pair(number, stem="{:09d}", suffix="jpg"):
    """The members of one pair, as img2dataset names them."""
    key = stem.format(number)
    tree = {"key": key, "caption": f"alt {number}", "synthetic": f"A picture, the {number}th."}
    return {
        f"{key}.{suffix}": image_bytes(number),
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
    """name -> offset of its header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member.offset for member in tar}


def read_all(shard):
    """(samples, bad_inputs) of `shard`."""
    items = list(reader.read(shard))
    samples = [item for item in items if isinstance(item, Sample)]
    bad_inputs = [item for item in items if isinstance(item, BadInput)]
    assert len(samples) + len(bad_inputs) == len(items)
    assert all(bad_input.samples >= 0 and bad_input.num_bytes >= 0 for bad_input in bad_inputs)
    return samples, bad_inputs


def lost(bad_inputs):
    return sum(bad_input.samples for bad_input in bad_inputs)
