"Tiny random models and tokenizers of many kinds; nothing is downloaded."
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ("the capital of France is Paris Liked red fox blue sky green tea Next item likes movie book song story "
         "Answer yes no A B C D : ; . ? Who wrote it").split()
TEXTS = [
    " ".join(WORDS),
    "Liked: red fox; blue sky. Next: green tea",
    "The capital of France is Paris.",
    "Answer: yes",
    "Answer: no",
] * 30
TITLES = ["red fox", "blue sky", "green tea", "movie book", "song story", "red sky"]

LLAMA = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
)
GPT = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)
KV, HEAD = dict(num_key_value_heads=1), dict(head_dim=16)
FAMILIES = {  # model_type: its settings; two layers of width 32
    "llama": LLAMA | KV,
    "mistral": LLAMA | KV | dict(sliding_window=8),
    "qwen2": LLAMA | KV,
    "qwen3": LLAMA | KV | HEAD,
    "gemma": LLAMA | KV | HEAD,
    "gemma2": LLAMA | KV | HEAD | dict(sliding_window=8, final_logit_softcapping=5.0),
    "gemma3_text": LLAMA | KV | HEAD | dict(sliding_window=8),
    "phi": LLAMA,
    "phi3": LLAMA | KV | dict(sliding_window=8),
    "gpt_neox": LLAMA,
    "gpt2": GPT,
    "gptj": GPT | dict(rotary_dim=8),
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        window_size=8,
        attention_types=[[["global", "local"], 1]],
    ),
    "opt": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
    ),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2),
    "mpt": dict(d_model=32, n_layers=2, n_heads=2, expansion_ratio=2, max_seq_len=128),
    "falcon": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        alibi=False,
        new_decoder_architecture=False,
        max_position_embeddings=128,
    ),
    "granite": LLAMA | KV | dict(logits_scaling=8.0),
    "cohere": LLAMA | KV | dict(logit_scale=0.25),
    "cohere2": LLAMA | KV | dict(sliding_window=8),
    "olmo2": LLAMA | KV,
    "stablelm": LLAMA | KV,
    "starcoder2": LLAMA | KV | dict(sliding_window=8),
    "gpt_bigcode": GPT,
    "mixtral": LLAMA | KV | dict(num_local_experts=2),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=8),
}

def byte_tokenizer(vocab=420, pad="<pad>", bos="<bos>", eos="<eos>", add="<bos> $A", texts=TEXTS):
    "Byte-level BPE as GPT-2's or Llama 3's; None: no such token. `add` is the template of marks."
    marks = [t for t in (pad, bos, eos) if t]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts, learn)
    if add:
        t.post_processor = processors.TemplateProcessing(
            single=add, pair=add + " $B", special_tokens=[(x, t.token_to_id(x)) for x in marks]
        )
    named = {k: v for k, v in dict(pad_token=pad, bos_token=bos, eos_token=eos).items() if v}
    return PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, **named)

def piece_tokenizer(vocab=300, texts=TEXTS):
    "Pieces with a space put before the text, as Llama 2's or Mistral's; no pad token."
    learn = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.train_from_iterator(texts, learn)
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", t.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )

def tiny_model(kind, tok, seed=0, **kw):
    "A random model of the family, its weights four times as large as usual so that logits differ."
    torch.manual_seed(seed)
    ids = dict(
        vocab_size=len(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id
    )
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ids, **(FAMILIES[kind] | kw)))
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return m.eval()
