"""Ids and chats against transformers' AutoTokenizer. Run: python -m pytest tests/test_tokenizer.py

Real checkpoints: python -m pytest tests/test_tokenizer.py --checkpoint DIR [--checkpoint DIR2]
"""
import json
import random

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

import model
from tokenizer import Tokenizer

CORPUS = ["def f(x):\n    return x + 1\n", "for i in range(10):\n\tprint(i, 'naïve café')\n",
          "the quick brown fox; the lazy dog", "如果 x > 0: return True  # 12345"] * 3
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"]
PIECES = ["def f(x):", "\n    ", "\t", "  ", " ", "return", "12345", "0x1F", "é", "e\u0301",
          "\ufb01", "A\u030a", "你好", "한국어", "\u1112\u1161\u11ab",
          "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f642", "\x00", "\x1b[0m", "\r\n",
          "\u200b", "\ufeff", "\xa0", "don't", "WE'LL", "'s", "…", "—", "<|im_start|>",
          "<|im_end|>", "<|bos|>", "<|endoftext|>", "<tool>", "<|im_", "|>", "…\n\n", "İ", "ß",
          "Ω", "\U0010ffff", "x" * 40, "==", "!=", "{}[]()",
          "\\n", "%s", "#", "_a_b"]
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- bos_token + '<|im_start|>system\\n' + messages[0]['content'] | trim + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {%- else %}
{{ '<|im_start|>' + message.role }}
{{ message | tojson }}<|im_end|>
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
{#- year #}{{ strftime_now('%Y') }} {{ ns.turns }}{{ undefined_name }}
"""
CHATS = [
    [{"role": "user", "content": "hi <b> 'é' & \"q\""}],
    [{"role": "system", "content": "  Be terse.\n"}, {"role": "user", "content": "1+1?"}],
    [{"role": "user", "content": "a\n\nb  "}, {"role": "assistant", "content": "  c\n"},
     {"role": "user", "content": "🙂 <|im_end|>"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "x", "name": None}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}],
    [{"role": "user", "content": "```python\nprint('%d')\n```"},
     {"role": "assistant", "content": "ok"}],
    [{"role": "user", "content": "\tif x:\n\t\tpass\n"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}] * 3,
    [{"role": "system", "content": "日本語"}, {"role": "user", "content": "e\u0301"}],
]


def strings(count=500, seed=0):
    """Texts joined from code, unicode, emoji, control characters and special-token text."""
    rng = random.Random(seed)
    return ["", *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count - 1))]


def make_folder(folder, model_type="llama", settings=None, post_processor=None, **files):
    """A byte-level BPE trained here, with special tokens first and one ordinary added token."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if post_processor:
        bpe.post_processor = post_processor
    bpe.enable_truncation(8)                    # AutoTokenizer ignores it, and so must we
    bpe.save(str(folder / "tokenizer.json"))
    files.setdefault("tokenizer_config", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, "pad_token": "<|pad|>",
        "chat_template": TEMPLATE, **(settings or {})})
    files.setdefault("config", {"model_type": model_type, "eos_token_id": 2})
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def both(folder):
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def add_bos(single="<|bos|> $A"):
    return processors.TemplateProcessing(single=single, special_tokens=[("<|bos|>", 0)])


VARIANTS = {
    "plain": {},
    "bos in the post-processor": {"post_processor": add_bos()},
    "bos in the settings alone, where it does nothing": {"settings": {"add_bos_token": True}},
    "bos switched off in the settings, in vain": {"settings": {"add_bos_token": False},
                                                  "post_processor": add_bos()},
    "token in the settings only": {"settings": {"added_tokens_decoder": {
        "2": {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False,
              "rstrip": False, "single_word": False},
        "401": {"content": "<|im_", "special": False, "normalized": False, "lstrip": False,
                "rstrip": True, "single_word": False}}}},
    "extra special tokens": {"settings": {"additional_special_tokens": ["==", "<tool>"]}},
    "eos that is no added token": {"settings": {"eos_token": "return"}},
    "qwen2 whatever the file says": {"model_type": "qwen2"},
    "qwen3, class of the file": {"model_type": "qwen3"},
    "qwen3, Qwen's class": {"model_type": "qwen3",
                            "settings": {"tokenizer_class": "Qwen2Tokenizer"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_auto_tokenizer(tmp_path, variant):
    ours, theirs = both(make_folder(tmp_path, **VARIANTS[variant]))
    for text in strings(200):
        assert ours.encode(text) == theirs(text).input_ids, repr(text)
        assert (ours.encode(text, add_special_tokens=False)
                == theirs(text, add_special_tokens=False).input_ids), repr(text)


def test_decoding_keeps_the_text_and_drops_special_tokens(tmp_path):
    ours = Tokenizer.from_pretrained(make_folder(tmp_path))
    for text in ["  x = 1\n\n", " don ' t . ", "é🙂\t"]:
        assert ours.decode(ours.encode(text)) == text, "nothing may be stripped or tidied"
    ids = ours.encode("ok<|im_end|><|pad|>")
    assert ours.decode(ids) == "ok", "an EOS is no part of a completion's text"
    assert ours.decode(ids, skip_special_tokens=False) == "ok<|im_end|><|pad|>"
    assert ours.decode([*ids, 5000]) == "ok", "ids past the vocabulary have no text"


def test_lone_surrogates_do_not_stop_the_tokenizer(tmp_path):
    ours = Tokenizer.from_pretrained(make_folder(tmp_path))
    assert ours.encode("a\udc80b") == ours.encode("a\ufffdb"), "a program may print any byte"


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chats_render_and_encode_as_in_transformers(tmp_path, chat, prompt):
    ours, theirs = both(make_folder(tmp_path, post_processor=add_bos()))
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.render_chat(chat, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids, "a second BOS, perhaps"


def test_a_template_file_wins_over_the_settings(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }} {{ messages[0].content }}")
    ours, theirs = both(tmp_path)
    assert ours.render_chat(CHATS[3]) == theirs.apply_chat_template(CHATS[3], tokenize=False)
    assert ours.render_chat(CHATS[3]).startswith("file <|im_end|>")


def test_a_base_model_without_a_template_gets_plain_text_and_its_bos(tmp_path):
    folder = make_folder(tmp_path, settings={"chat_template": None}, post_processor=add_bos())
    ours = Tokenizer.from_pretrained(folder)
    assert ours.render_chat(CHATS[1]) == "  Be terse.\n\n1+1?\n"
    assert ours.encode_chat(CHATS[1])[0] == 0, "no template writes the BOS, so encoding must"


@pytest.mark.parametrize("template, expected", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for x in %}", "syntax error in line 1"),
    ("{{ messages.append(1) }}", "not safe|unsafe|immutable|append"),
    ("{{ ''.__class__.__mro__ }}", "__class__|unsafe"),
    ("{{ messages[0].content + 1 }}", "failed"),
])
def test_a_template_that_fails_or_misbehaves_is_one_line(tmp_path, template, expected):
    ours = Tokenizer.from_pretrained(make_folder(tmp_path, settings={"chat_template": template}))
    with pytest.raises(ValueError, match=expected) as caught:
        ours.render_chat(CHATS[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files, eos", [
    ({"generation_config": {"eos_token_id": [2, 3]}}, [2, 3]),
    ({"generation_config": {"eos_token_id": 3}}, [3]),
    ({"generation_config": {}}, [2]),
    ({"config": {"model_type": "llama"}}, [2]),
    ({"config": {"model_type": "llama", "eos_token_id": [1, 2]}}, [1, 2]),
], ids=str)
def test_every_eos_id_is_known(tmp_path, files, eos):
    assert Tokenizer.from_pretrained(make_folder(tmp_path, **files)).eos_ids == eos


def test_pad(tmp_path):
    ours = Tokenizer.from_pretrained(make_folder(tmp_path))
    assert ours.pad_id == 3
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).pad_id == 2, "without a pad token an EOS fills"


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_importable_from_model():
    assert model.Tokenizer is Tokenizer


@pytest.mark.checkpoint
def test_real_tokenizers_agree_on_500_strings(checkpoints):
    for folder in checkpoints:
        ours, theirs = both(folder)
        assert len(ours.backend.get_vocab(True)) == len(theirs)
        for text in strings(500):
            assert ours.encode(text) == theirs(text).input_ids, (folder, text)
            assert ours.decode(ours.encode(text)) == theirs.decode(
                theirs(text).input_ids, skip_special_tokens=True), (folder, text)


@pytest.mark.checkpoint
def test_real_chat_templates_agree_on_ten_conversations(checkpoints):
    for folder in checkpoints:
        ours, theirs = both(folder)
        for chat in CHATS:
            for prompt in (True, False):
                ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt,
                                                 return_dict=False)
                assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids, (folder, chat)
