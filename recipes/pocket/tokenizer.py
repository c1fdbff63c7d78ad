"""Train the pocket model's tokenizer on the corpus and give it its chat template.

A byte-level BPE of 4,096 tokens. Indentation is the commonest thing in the corpus, so a line break and the blanks after it are
one piece of the pre-tokenizer; digits come in threes at most. The template renders BOS once, and marks the assistant's words,
so that `return_assistant_tokens_mask` says what to train on. `<|mask|>` is never trained on: it is there for block drafters.

    python recipes/pocket/tokenizer.py --corpus runs/stdlib --output runs/pocket-tokenizer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from understudy.data.conversations import read

VOCABULARY = 4096
CONTEXT = 2048
BOS, USER, ASSISTANT, END, MASK, SYSTEM = (
    f"<|{name}|>" for name in ("endoftext", "user", "assistant", "end", "mask", "system")
)
SPECIAL = [BOS, USER, ASSISTANT, END, MASK, SYSTEM, "<|reserved_0|>", "<|reserved_1|>"]  # ids 0 to 7
PIECES = r"\n[ ]*|[ ]?[A-Za-z]+|[0-9]{1,3}|[ ]?[^\sA-Za-z0-9]+|[ ]+(?=\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='assistant' %}{{ '<|assistant|>\\n' }}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def texts(corpus: Path) -> Iterator[str]:
    for conversation in read(corpus / "train.jsonl"):
        for message in conversation.messages:
            yield message.content


def build(corpus: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=BOS,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="where the tokenizer is saved")
    args = parser.parse_args()
    tokenizer = build(args.corpus)
    tokenizer.save_pretrained(args.output)
    print(f"{len(tokenizer)} tokens in {args.output}")


if __name__ == "__main__":
    main()
