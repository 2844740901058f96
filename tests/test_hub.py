"""Pushing to the Hub and loading from there, against a local server: what would be uploaded, file by file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, local_hub
from hub_worker import logits_of
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from launching import HANG
from methods import method_named
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
BASE, ADAPTER = "tester/tiny-llada", "tester/tiny-agrpo"
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
}


def test_a_token_among_the_arguments_is_refused(tmp_path):
    """transformers pickles the arguments into a file that it pushes."""
    with pytest.raises(ValueError, match=r"does not support `hub_token`.* pushed with it"):
        method_named("agrpo").make(tmp_path, push_to_hub=True, hub_token=TOKEN)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(the hub after a user pushed a base model and trained an adapter over it, the folder of the run)."""
    folder = tmp_path_factory.mktemp("hub")
    with local_hub() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CI": "1",  # no telemetry of TRL either
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, str(TESTS / "hub_worker.py"), BASE, ADAPTER, str(folder / "run")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        yield hub, folder / "run"


def test_an_adapter_is_pushed_file_by_file(pushed):
    hub, folder = pushed
    assert hub.refused == []
    files = hub.files(ADAPTER)
    assert files.keys() == ADAPTER_FILES
    for name in ADAPTER_FILES:
        assert files[name] == (folder / name).read_bytes(), name
    messages = [commit.message for commit in hub.repos[ADAPTER]]
    assert messages == ["Training in progress, step 2", "Training in progress, step 3", "End of training"]
    # every push while training already has the adapter
    assert all("adapter_model.safetensors" in commit.files for commit in hub.repos[ADAPTER])


def test_no_weight_of_the_base_is_pushed(pushed):
    hub, _ = pushed
    weights = load(hub.files(ADAPTER)["adapter_model.safetensors"])
    layers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert weights.keys() == {
        f"base_model.model.model.layers.{block}.{layer}.lora_{matrix}.weight"
        for block in (0, 1)
        for layer in layers
        for matrix in "AB"
    }
    assert all(weights[name].any() for name in weights)
    base = len(hub.files(BASE)["model.safetensors"])
    assert not any("model.safetensors" in commit.files for commit in hub.repos[ADAPTER]) and base > 0


def test_the_card_names_base_family_method_data_set_and_paper(pushed):
    hub, _ = pushed
    files = hub.files(ADAPTER)
    card = files["README.md"].decode()
    metadata = card.split("---")[1]
    for line in (
        f"base_model: {BASE}",
        "datasets: tester/words",
        "library_name: peft",
        "base_model_relation: adapter",
    ):
        assert line in metadata
    for text in (
        f"[{BASE}](https://huggingface.co/{BASE})",
        "| family | llada",
        "LoRA adapter (r 4",
        " on `q_proj`, `o_proj`, `down_proj` |",
        "| method | AGRPO, [2510.04019]",
        "@article{zhan2025simple",
        f'PeftModel.from_pretrained(model, "{ADAPTER}")',
        "import trl_diffusion",
    ):
        assert text in card, text
    assert "None" not in card and "pipeline" not in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_the_token_is_in_no_pushed_file(pushed):
    hub, _ = pushed
    assert not any(TOKEN.encode() in content for content in hub.files(ADAPTER).values())


def test_someone_else_gets_the_same_logits(pushed, tmp_path):
    hub, folder = pushed
    api = HfApi(endpoint=hub.url, token=TOKEN)
    base = api.snapshot_download(BASE, local_dir=tmp_path / "base")
    adapter = api.snapshot_download(ADAPTER, local_dir=tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    untrained = logits_of(model)
    trained = torch.load(folder.parent / "logits.pt")
    assert torch.equal(logits_of(PeftModel.from_pretrained(model, adapter)), trained)
    assert not torch.equal(untrained, trained)
    assert AutoTokenizer.from_pretrained(adapter).mask_token == "<mask>"


def test_the_server_refuses_what_the_hub_refuses(tmp_path):
    """A server that lets everything pass would prove nothing."""
    (tmp_path / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    with local_hub() as hub:
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(endpoint=hub.url, token="hf_wrong").create_repo("mine")
        api = HfApi(endpoint=hub.url, token=TOKEN)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/mine")
        repo = api.create_repo("mine").repo_id
        with pytest.raises(ValueError, match='"base_model" with value "/home/me/model" is not valid'):
            api.upload_folder(repo_id=repo, folder_path=tmp_path)
        wrong_hash = get_session().put(f"{hub.url}/large/{'0' * 64}", content=b"weights")
        assert wrong_hash.status_code == 400 and hub.repos[repo] == [] and hub.large == {}
