"""Text to ids and back, and chats to prompts, exactly as Hugging Face's AutoTokenizer does it.

The ids come from the checkpoint's own tokenizer.json through the `tokenizers` library. Around it AutoTokenizer applies
rules of its own, repeated here because training on other ids than the model was made with goes unnoticed: tokens that
only tokenizer_config.json names are added, truncation and padding are off, and for Qwen's tokenizer class normaliser
and splitting are Qwen's whatever the file says. (For that class it also adds "<|endoftext|>" where a vocabulary has
none, an id that the model has no row for: left out here.) BOS is the file's affair alone.

Not covered: slow tokenizers (no tokenizer.json), tools, documents, several chat templates.
"""
import json
import re
from datetime import datetime
from functools import cache, partial

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from weights import read_json, resolve_folder

# Qwen's published splitting: contractions, words, single digits, punctuation, newlines, blanks.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def highest_id(tokenizer_json):
    """The highest id that a parsed tokenizer.json gives to any token, or -1."""
    vocab = tokenizer_json.get("model", {}).get("vocab", {})
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return max([*ids, *(token["id"] for token in tokenizer_json.get("added_tokens") or [])], default=-1)


def token_text(token):
    """A token of tokenizer_config.json, a str or {"content": str, ...} -> its text."""
    return token["content"] if isinstance(token, dict) else token


class Tokenizer:
    """A checkpoint's tokenizer.

    eos_ids: every id that ends a completion (generation_config.json, else config.json, else the tokenizer's EOS).
    pad_id: an id to fill with, never to be told from content by value.
    """

    @classmethod
    def from_pretrained(cls, path_or_hub_id):
        """Read a folder or a hub id. FileNotFoundError or ValueError, one line, where there is none or it is broken."""
        return cls(resolve_folder(path_or_hub_id))

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: AutoTokenizer's save_pretrained writes one")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:              # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {str(error).splitlines()[0]}") from None
        config, generation, names, settings = (read_json(folder / f"{name}.json", {}) for name in (
            "config", "generation_config", "special_tokens_map", "tokenizer_config"))
        names |= settings
        self.special_tokens = {name: token_text(names[name]) for name in SPECIAL_NAMES if names.get(name)}
        self._follow_auto_tokenizer(config, settings)
        ids = {name: self.backend.token_to_id(text) for name, text in self.special_tokens.items()}
        eos = [generation.get("eos_token_id"), config.get("eos_token_id"), ids.get("eos_token"), []]
        eos = next(found for found in eos if found is not None)
        self.eos_ids = eos if isinstance(eos, list) else [eos]
        pads = [ids.get("pad_token"), generation.get("pad_token_id"), config.get("pad_token_id"), *self.eos_ids, 0]
        self.pad_id = next(found for found in pads if found is not None)
        self.folder, self.chat_template = folder, settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    def _follow_auto_tokenizer(self, config, settings):
        """Apply what AutoTokenizer adds to or replaces in tokenizer.json."""
        backend = self.backend
        backend.no_truncation()
        backend.no_padding()
        model_type = config.get("model_type")
        declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
        if model_type == "qwen2" or (model_type == "qwen3" and declared in QWEN_CLASSES):
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        entries = settings.get("added_tokens_decoder") or {}        # {"id": {"content": ...}, ...}
        for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                backend.add_tokens([AddedToken(**{k: v for k, v in entry.items() if k != "__type"})])
                known.add(entry["content"])
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        extra = extra.values() if isinstance(extra, dict) else extra
        for token in [*self.special_tokens.values(), *map(token_text, extra)]:
            if token not in known:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])

    def encode(self, text, add_special_tokens=True):
        """str -> list[int], AutoTokenizer's `input_ids`, BOS included where the tokenizer adds one."""
        # lone surrogates are undecodable bytes in a program's output, and no tokenizer takes them
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True):
        """Ids -> str, unstripped. Ids past the vocabulary are left out; special tokens (EOS, pad) unless asked for."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        """[{"role": str, "content": str}, ...] -> the text a chat model is prompted with.

        Without a template (a base model) the contents, each ended by a newline. ValueError if the template refuses.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self.chat_template is None:
            return "".join(message["content"] + "\n" for message in messages)
        try:
            return compile_template(self.chat_template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                **self.special_tokens)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template of {self.folder} failed: {error}") from None

    def encode_chat(self, messages, add_generation_prompt=True):
        """Ids of `render_chat`, without another BOS: a template writes its own."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=self.chat_template is None)


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}` marks the assistant's part: render what is inside."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


@cache
def compile_template(source):
    """A jinja2 template with the options, filters and globals that chat templates rely on. Templates are programs that
    nobody here wrote: they run in jinja2's immutable sandbox."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag])
    # jinja2's own filter escapes HTML characters, which would change the prompt
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from None
