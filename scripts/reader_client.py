"""One program that loads a branch, run by scripts/interop in that program's own environment.

usage: reader_client.py READER BRANCH DUMP RESULT [CONVERTER CONVERTER_PYTHON]
       reader_client.py gguf FILE DUMP RESULT TYPE TEXTS

DUMP is what `gptq eval --dump-logits` wrote: `tokens` int64 [W,S] and `logits` fp32 [W,S,V]. RESULT becomes a JSON object:
the program and its version, how many positions have our most likely token, the largest and the mean difference of a logit, and
64 greedy tokens after the first 32 of the first window.

READER gguf is llama.cpp on FILE as it is (TYPE `own`), or with all tensors made fp32 by llama.cpp first (TYPE `f32`). TEXTS is a
JSON list of texts with the ids of the model's tokenizer; the result says how many llama.cpp splits otherwise.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PROMPT, GREEDY = 32, 64


def transformers(branch):
    """The stock path, with nothing chosen but the data type of the activations."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(branch, dtype=torch.float32, device_map="cpu")
    return torch_model(model), f"transformers {version('transformers')}"


def gptqmodel(branch):
    """The torch backend refuses to load as fp32, so the model is widened after it has loaded."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(branch, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    return torch_model(loaded.model.float()), f"GPTQModel {version('gptqmodel')}"


def autogptq(branch):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import auto_gptq.modeling._base as base
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    # It asks for a GPU's capability even where there is none, before it decides for its CPU kernels.
    base._validate_marlin_device_support = lambda: False
    loaded = AutoGPTQForCausalLM.from_quantized(
        branch, device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True, disable_exllamav2=True,
        inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=torch.float32,
    )
    return torch_model(loaded.model.float()), f"AutoGPTQ {version('auto-gptq')}"


def torch_model(model):
    """Logits of a window, and greedy tokens, of a model of transformers."""
    import torch

    model = model.eval()

    def logits(tokens):
        with torch.inference_mode():
            return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()

    def greedy(prompt):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=GREEDY, max_new_tokens=GREEDY
            )
        return made[0, len(prompt) :].tolist()

    return logits, greedy


def vllm(branch):
    import numpy
    import vllm as library

    config = json.loads((Path(branch) / "config.json").read_text())
    vocab = config["vocab_size"]
    # Half precision is all it takes for GPTQ; of the two fp16 is the more precise.
    model = library.LLM(
        branch, dtype="float16", enforce_eager=True, max_model_len=512, max_num_seqs=1, max_logprobs=vocab,
        enable_prefix_caching=False, max_num_batched_tokens=512, logprobs_mode="raw_logits",
    )

    def logits(tokens):
        every = library.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocab, logprobs=vocab, detokenize=False)
        (output,) = model.generate([{"prompt_token_ids": tokens}], every, use_tqdm=False)
        # The first token of a prompt has no prediction; what would follow the last one stands with the new token.
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        return numpy.array([[row[token].logprob for token in range(vocab)] for row in rows], dtype=numpy.float32)

    def greedy(prompt):
        further = library.SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)
        (output,) = model.generate([{"prompt_token_ids": prompt}], further, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return (logits, greedy), f"vLLM {library.__version__} (CPU build, fp16)"


def llamacpp(branch, converter, converter_python):
    """Converted to fp32 by llama.cpp's own converter, which is in the source of llama-cpp-python."""
    work = tempfile.TemporaryDirectory()
    file = Path(work.name) / "model.gguf"
    command = [converter_python, converter, "--outtype", "f32", "--outfile", file, branch]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit((done.stderr.strip().splitlines() or ["the converter failed"])[-1])
    return llama_model(file, work)[0], f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}, converted to fp32"


def llama_model(file, keep=None):
    """Logits of a window and greedy tokens of llama.cpp, and the model itself."""
    import llama_cpp
    import numpy

    model = llama_cpp.Llama(
        str(file), n_ctx=512, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, logits_all=True, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )

    def logits(tokens, _keep=keep):
        model.reset()
        model.eval(tokens)
        return numpy.array(model.scores[: len(tokens)], dtype=numpy.float32)

    def greedy(prompt):
        model.reset()
        made, tokens = [], prompt
        for _ in range(GREEDY):
            model.eval(tokens)
            tokens = [int(model.scores[model.n_tokens - 1].argmax())]
            made += tokens
        return made

    return (logits, greedy), model


def gguf(file, kind):
    """A GGUF file as it is, or dequantized to fp32 by llama.cpp."""
    import llama_cpp

    name, work = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}", tempfile.TemporaryDirectory()
    if kind == "f32":
        wide = Path(work.name) / "wide.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 2
        if llama_cpp.llama_model_quantize(str(file).encode(), str(wide).encode(), params) != 0:
            sys.exit("llama_model_quantize failed")
        file, name = wide, f"{name}, dequantized to fp32"
    functions, model = llama_model(file, work)
    return functions, name, model


def split_otherwise(model, texts):
    """The texts for which llama.cpp's ids are not those of the model's tokenizer."""
    import llama_cpp.llama_chat_format  # noqa: F401 - completes the package

    return [text for text, ids in texts if model.tokenize(text.encode(), add_bos=True, special=False) != ids]


def likelihood(logits, tokens):
    """Sum over a window of the log-likelihoods of all tokens but the first."""
    import numpy

    wide = logits[:-1].astype(numpy.float64)
    top = wide.max(-1, keepdims=True)
    sums = numpy.log(numpy.exp(wide - top).sum(-1)) + top[:, 0]
    return float((wide[numpy.arange(len(tokens) - 1), tokens[1:]] - sums).sum())


READERS = {
    "transformers": transformers,
    "gptqmodel": gptqmodel,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "autogptq": autogptq,
}


def main():
    reader, branch, dump, result, *rest = sys.argv[1:]
    import numpy
    from safetensors.numpy import load_file

    ours = load_file(dump)
    extra = {}
    if reader == "gguf":
        kind, texts = rest
        (logits, greedy), program, model = gguf(branch, kind)
        extra["split otherwise"] = split_otherwise(model, json.loads(Path(texts).read_text()))
    else:
        (logits, greedy), program = READERS[reader](branch, *rest)
    same = worst = total = 0.0
    likelihoods = numpy.zeros(2)
    for tokens, expected in zip(ours["tokens"], ours["logits"]):
        got = logits(tokens.tolist())
        if got.shape != expected.shape:
            raise ValueError(f"logits of shape {got.shape}, ours are {expected.shape}")
        likelihoods += [likelihood(rows, tokens) for rows in (got, expected)]
        same += (got.argmax(-1) == expected.argmax(-1)).sum()
        difference = numpy.abs(got - expected)
        worst, total = max(worst, difference.max()), total + difference.mean()
    windows = len(ours["tokens"])
    row = {"program": program, "top1": float(same / ours["tokens"].size), "max": float(worst), "mean": float(total / windows)}
    perplexities = numpy.exp(-likelihoods / (ours["tokens"].size - windows))
    row |= {"perplexity": float(perplexities[0]), "ours": float(perplexities[1])} | extra
    row["greedy"] = greedy(ours["tokens"][0, :PROMPT].tolist())
    Path(result).write_text(json.dumps(row))


if __name__ == "__main__":
    main()
