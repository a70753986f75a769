"""Compares the ids of `prepare.tokenizer clip` with those of open-clip-torch's own tokenizer.

Run by hand, never by pytest or CI: the vocabulary has 1.3 MB. The wheel is not installed; its module is loaded.
From the repository's root:

    pip download open-clip-torch --no-deps -d DIR
    .venv/bin/python tests/interop/compare_clip_tokenizer.py DIR/open_clip_torch-3.3.0-py3-none-any.whl

Texts: the bundled captions, those below, and COUNT random ones, cleaned for our tokenizer as captions are; theirs
cleans them itself. The program ends with an error at the first difference.

Result with open-clip-torch 3.3.0 and tokenizers 0.23.3: 20,513 texts have equal ids; 8,495 of them were cut to 77
tokens.
"""

import contextlib
import importlib.util
import random
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LENGTH = 77
COUNT = 20_000
SOURCES = [ROOT / "aimv2_jax/data/sample" / split / "photo" for split in ("train", "test")]
TEXTS = [
    "a photo of a cat",
    "A Photo of the SMALLEST Dog, NOT a cat!",
    "it's he'll they're we've I'm she'd don't 'tis 'S x''s ’s 'ſ",
    "1234567 3.14159 2nd 50% $9.99 x² ½ Ⅸ ٢٣",
    "two  spaces,   three\ttabs\nand lines \u00a0 \u3000 wide",
    "😀🐱\u200d👤 🇩🇪 ❤️ 👍🏽!!!",
    "日本語のテキスト 한국어 中文",
    "Привет Ελληνικά עברית العربية हिन्दी",
    "café cafe\u0301 naïve straße İstanbul Æther ﬁne",
    "&lt;b&gt;bold&lt;/b&gt; &amp; &amp;amp; AT&T R&amp;D &eacute; &#233;",
    "http://example.com/a_b-c?d=e&f=g#h user@mail.org #tag @user C++ a/b \\ ^ ~ `x` {y} [z] <w>",
    "...---... ?!?! ((())) — – … “quoted” «guillemets»",
    "Antidisestablishmentarianism supercalifragilisticexpialidocious " + "x" * 300,
    "a long caption of words that go on and on, " * 20,
    "</w> a</w> end</w>of",
]
LETTERS = (
    "aAbBeEiIlLmMnNoOrRsStTvVdD'''...,,  \t\n0123456789-_&;#<>/"
    "éßİſΑαЖжאبहि日あ한½²Ⅸ٣’“—❤😀🐱🏽🇩𐍈𝔸\u200b\u200d\ufe0f\u0301"
)


def main(wheel: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from aimv2_jax.data import records
    from aimv2_jax.data.records import BadRecord
    from aimv2_jax.data.sources import Source
    from aimv2_jax.data.tokenizer import Tokenizer
    from aimv2_jax.data.transforms.captions import clean
    from aimv2_jax.prepare.tokenizer import main as prepare

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        spec = importlib.util.spec_from_file_location("theirs", f"{folder}/open_clip/tokenizer.py")
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        assert prepare(["clip", f"--vocabulary={wheel}", f"--output={folder}/tokenizer.json"]) == 0
        ours = Tokenizer(f"{folder}/tokenizer.json", LENGTH, 49_408, always_end=True)
    captions = []
    for source in (Source("photo", str(path)) for path in SOURCES):
        for index in range(len(source)):
            record = records.decode(source.read(index))
            captions += [text for kind in source.kinds for text in record.texts(kind)]
    rng = random.Random(0)
    randoms = ["".join(rng.choices(LETTERS, k=rng.randrange(1, 120))) for _ in range(COUNT)]
    texts, cleaned = [], []
    for text in [*captions, *TEXTS, *randoms]:
        with contextlib.suppress(BadRecord):  # Nothing is left of some random texts.
            cleaned.append(clean(text).encode())
            texts.append(text)
    arrays = ours.batch_arrays(cleaned)
    expected = theirs.tokenize(texts, LENGTH).numpy()
    # They pad with 0, this project with the end.
    length = 2 + arrays["token_valid"].sum(axis=1)
    actual = np.where(np.arange(LENGTH) < length[:, None], arrays["tokens"], 0)
    for text, row, other in zip(texts, actual, expected, strict=True):
        assert row.tolist() == other.tolist(), (text, row.tolist(), other.tolist())
    print(f"{len(texts):,} texts have equal ids; {arrays['truncated'].sum():,} of them were cut to {LENGTH} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
