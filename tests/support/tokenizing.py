"""Tokenizers of several families, trained on the prose of the tasks."""

from functools import cache
from itertools import islice
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kara_hf.tasks.haystack import prose


@cache
def tokenizer(kind):
    """bpe: trained on prose. bytes: one token each, behind one that begins every text. unigram: of another family."""
    english = [*islice(prose(Random(0)), 800), " ".join(map(str, range(1000)))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.train_from_iterator(
            english,
            trainers.UnigramTrainer(
                vocab_size=1000,
                special_tokens=["<unk>"],
                unk_token="<unk>",
                initial_alphabet=["\n", *map(chr, range(33, 127))],
                show_progress=False,
            ),
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000 if kind == "bpe" else 257,
        special_tokens=["<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(english, trainer)
    if kind == "bytes":
        made.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made)
