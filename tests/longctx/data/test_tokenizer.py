import pytest
import tokenizers

from longctx.data.config import DataError
from longctx.data.tokenizer import load_tokenizer

TEXT = "def naïve():\n    return '→'\n"


def byte_level(path, special):
    """A small byte-level BPE, as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(path))
    return str(path)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(TEXT.encode()).tolist()
    assert tokens == list(TEXT.encode())
    assert tokenizer.decode([tokenizer.boundary, *tokens]) == TEXT
    assert tokenizer.boundary == tokenizer.vocab_size - 1 == 256
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([*tokens, 258]) == TEXT  # of a vocabulary that was padded


def test_tokenizer_file(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t.json", ["<pad>", "<|endoftext|>"]))
    tokens = tokenizer.encode(TEXT.encode())
    assert len(tokens) < len(TEXT.encode())
    assert tokenizer.boundary == 1
    assert tokenizer.decode([tokenizer.boundary, *tokens.tolist()]) == TEXT
    assert 256 < tokenizer.vocab_size <= 300
    assert tokens.max() < tokenizer.vocab_size


def test_tokenizer_without_a_boundary(tmp_path):
    with pytest.raises(DataError, match="none of the boundary tokens"):
        load_tokenizer(byte_level(tmp_path / "t.json", ["<pad>"]))


def test_missing_or_broken_tokenizer_file(tmp_path):
    with pytest.raises(DataError, match="neither 'bytes' nor an existing file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
