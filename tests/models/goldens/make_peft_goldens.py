"""Make the reference answers of PEFT for adapter folders that this project wrote. Run by hand, never by the tests.

    PYTHONPATH=. python tests/models/goldens/make_peft_goldens.py write [FAMILY ...]   with this project's environment
    python tests/models/goldens/make_peft_goldens.py answer [FAMILY ...]     with torch, transformers and peft

`write` exports a small adapter on some of the models here as FAMILY/peft/{adapter_config.json,
adapter_model.safetensors}; `answer` opens each by `peft` on its model and writes FAMILY/peft/golden.npz. A test holds
an export of today to the committed folder tensor for tensor, so the answers are PEFT's answers to what is exported.

The files here were made with Python 3.11, torch 2.13.0 (gemma3: 2.14.1) on CPU, transformers 5.24.0, peft 0.21.2, in
float64 with eager attention, after loading in float32. For gemma3, a text model inside one of images and text, PEFT was
seen to load every tensor of the folder and to adapt no module beside them.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def write(chosen):
    from distill_jax.models.model import load_model, save_model
    from tests.models.small_models import PEFT_ADAPTERS, PEFT_SCALE, exact_adapter

    for name, config in PEFT_ADAPTERS.items():
        if chosen and name not in chosen:
            continue
        model = load_model(HERE / name)
        folder = HERE / name / "peft"
        shutil.rmtree(folder, ignore_errors=True)
        adapter = exact_adapter(model.module, config)
        save_model(model, folder, adapter, PEFT_SCALE, merge=False, adapter_config=config)


def answer(chosen):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for folder in sorted(HERE.glob("*/peft")):
        if chosen and folder.parent.name not in chosen:
            continue
        base = AutoModelForCausalLM.from_pretrained(
            folder.parent, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = np.load(folder.parent / "golden.npz")["tokens"]
        batch = torch.tensor(tokens, dtype=torch.long)
        with torch.no_grad():
            without = base.double()(input_ids=batch, use_cache=False).logits.numpy()
            model = PeftModel.from_pretrained(base, folder).eval().double()
            check_names(model, folder)
            logits = model(input_ids=batch, use_cache=False).logits.numpy()
        np.savez_compressed(folder / "golden.npz", tokens=tokens, logits=logits.astype(np.float32))
        moved = np.abs(logits - without).max()
        print(f"{folder.parent.name}: logits std {logits.std():.2f}, moved by the adapter {moved:.2f}")


def check_names(model, folder):
    from safetensors.numpy import load_file

    adapted = {name.replace(".default.", ".") for name in model.state_dict() if ".lora_" in name}
    stored = set(load_file(folder / "adapter_model.safetensors"))
    if adapted != stored:
        raise SystemExit(f"{folder}: PEFT has {sorted(adapted ^ stored)} on one side only")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("write", "answer"))
    parser.add_argument("family", nargs="*", help="all by default")
    given = parser.parse_args()
    {"write": write, "answer": answer}[given.step](given.family)
