"""What the environment may ask for: done as asked, or refused by name."""

import json

import pytest
import yaml
from support import launch_ranks, run_command, run_script

from cxrdist.environment import refuse_settings
from cxrdist.errors import CxrdistError

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
REFUSED = [
    *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "ACCELERATE_GRADIENT_CLIPPING=1.0"),
    *("ACCELERATE_MIXED_PRECISION=fp8", "ACCELERATE_MIXED_PRECISION=BF16"),
    *("ACCELERATE_MIXED_PRECISION=fp16", "ACCELERATE_USE_CPU=perhaps"),
    *("ACCELERATE_DYNAMO_BACKEND=inductor", "ACCELERATE_DYNAMO_MODE=max-autotune"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH=1", "ACCELERATE_DYNAMO_USE_DYNAMIC=True"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=True",
    *("ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_DEEPSPEED=true"),
    *("ACCELERATE_USE_MEGATRON_LM=true", "ACCELERATE_USE_PARALLELISM_CONFIG=true"),
    *("ACCELERATE_USE_SAGEMAKER=true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE=MODEL_PARALLEL"),
    *("ACCELERATE_DEEPSPEED_ZERO_STAGE=3", "ACCELERATE_DEEPSPEED_CONFIG_FILE=zero.json"),
    *("ACCELERATE_FP8_BACKEND=TE", "ACCELERATE_FP8_FORMAT=E4M3"),
    *("ACCELERATE_TORCH_DEVICE=cpu", "ACCELERATE_DOWNCAST_BF16=yes"),
    *("ACCELERATE_BYPASS_DEVICE_MAP=true", "ACCELERATE_ALLOW_CP_STANDALONE=true"),
    *("ACCELERATE_INIT_INCLUDE_BUFFERS=1", "ACCELERATE_OF_THE_FUTURE=2"),
    *("FSDP_SHARDING_STRATEGY=FULL_SHARD", "FSDP_OFFLOAD_PARAMS=true"),
    *("MEGATRON_LM_TP_DEGREE=2", "PARALLELISM_CONFIG_TP_SIZE=2"),
    *("NVIDIA_TF32_OVERRIDE=1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
    *("CUBLAS_EMULATE_SINGLE_PRECISION=1", "ONEDNN_DEFAULT_FPMATH_MODE=BF16"),
    "DNNL_DEFAULT_FPMATH_MODE=ANY",
]
ACCEPTED = [
    *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1", "ACCELERATE_MIXED_PRECISION=bf16"),
    *("ACCELERATE_USE_CPU=True", "ACCELERATE_USE_FSDP=false", "ACCELERATE_USE_DEEPSPEED=False"),
    *("ACCELERATE_DYNAMO_BACKEND=NO", "ACCELERATE_DYNAMO_MODE=default"),
    *("ACCELERATE_DYNAMO_USE_DYNAMIC=False", "ACCELERATE_CPU_AFFINITY=1"),
    *("ACCELERATE_LOG_LEVEL=DEBUG", "ACCELERATE_DEBUG_MODE=true", "FSDP_OFFLOAD_PARAMS=false"),
    *("NVIDIA_TF32_OVERRIDE=0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0"),
    *("ONEDNN_DEFAULT_FPMATH_MODE=STRICT", "FSDPLUS=2", "TORCH_HOME=/models"),
]


@pytest.mark.parametrize("setting", REFUSED)
def test_what_would_change_the_mathematics_is_refused_by_name(monkeypatch, setting):
    """The line has the variable, its value and what to do; so has one that nobody knows yet."""
    monkeypatch.setenv(*setting.split("=", 1))
    with pytest.raises(CxrdistError, match=f"^{setting}: .*(unset it|accelerate config)"):
        refuse_settings(gpu=False)


@pytest.mark.parametrize("setting", ACCEPTED)
def test_defaults_and_what_changes_no_result_are_accepted(monkeypatch, setting):
    """Some are set by `accelerate launch` itself."""
    monkeypatch.setenv(*setting.split("=", 1))
    refuse_settings(gpu=False)


def test_fp16_is_refused_where_a_cpu_computes(monkeypatch):
    """Also on a machine with GPUs that are not to be used."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "no")
    refuse_settings(gpu=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    with pytest.raises(CxrdistError, match="MIXED_PRECISION=fp16: needs a GPU"):
        refuse_settings(gpu=True)


def test_what_the_launcher_sets_is_accepted_and_known(tmp_path):
    """Two real ranks: the launcher's own variables pass, the honoured ones are reported."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "from cxrdist.distributed import start\n"
        "from cxrdist.environment import settings\n"
        "rank = start().process_index\n"
        "pathlib.Path(sys.argv[1], str(rank)).write_text(json.dumps(settings()))\n"
    )
    done = launch_ranks(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found["ACCELERATE_MIXED_PRECISION"] == "no"
        assert found["OMP_NUM_THREADS"] == "1"


BUILT = """
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from cxrdist.distributed import refuse_other_mathematics
from cxrdist.errors import CxrdistError
try:
    refuse_other_mathematics(Accelerator(cpu=True{}))
except CxrdistError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (", gradient_accumulation_steps=4", "gradient_accumulation_steps 4, expected 1"),
        (", mixed_precision='bf16'", "mixed_precision bf16, expected no"),
        (", dynamo_backend='aot_eager'", "dynamo_backend AOT_EAGER, expected NO"),
        ("", ""),
    ],
)
def test_what_accelerate_has_made_of_it_is_checked(option, complaint):
    """A setting that reaches accelerate in another way than by a known variable is seen."""
    done = run_script(BUILT.format(option))
    assert done.returncode == 0, done.stderr
    assert complaint in done.stdout
    assert bool(done.stdout) == bool(complaint)


@pytest.fixture
def command(shards, tmp_path) -> list[object]:
    """Train one epoch of a small network."""
    recipe = {
        **{"init": "none", "global_batch_size": 10, "copies": {}},
        "stages": {"all": {"lr": dict.fromkeys(BLOCKS, 0.01), "epochs": 1, "patience": 1}},
        "network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    paths = ("--config", tmp_path / "recipe.yaml", "--shards", shards, "--cache", tmp_path)
    return ["train", *paths, "--run", tmp_path / "run"]


def test_a_training_says_that_it_will_not_accumulate_gradients(command, monkeypatch):
    """One line and exit code 2; before, the learning rate was a quarter of the recipe's."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    done = run_command(*command)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cxrdist: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: ")
    assert "global_batch_size" in done.stderr


def test_a_run_tells_what_the_environment_asked_for(command, monkeypatch, tmp_path):
    """run.json has the variables that were honoured."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    done = run_command(*command, threads=2)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["mixed_precision"] == "bf16"
    expected = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "yes"}
    expected |= {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "2"}
    assert info["environment"] == expected
