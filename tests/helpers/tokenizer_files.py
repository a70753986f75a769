"""A small `tokenizer.json`, by the library that reads it."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}


def word_tokenizer(words: str = "a b c red blue disc number") -> dict[str, Any]:
    """The content of a file that has one piece a word, in order from id 4, and texts between `<s>` and `</s>`."""
    vocabulary = SPECIAL | {word: index for index, word in enumerate(words.split(), len(SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", SPECIAL["<s>"]), ("</s>", SPECIAL["</s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return json.loads(tokenizer.to_str())
