"""Environment variables that would change results: some are honoured, others are rejected."""

import os

from cxrdist.errors import CxrdistError

# All variables with these prefixes are rejected unless they are listed below or turn something off,
# so that new variables of later accelerate versions are neither obeyed nor ignored silently.
KINDS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# The spellings of a switch that accelerate accepts (utils.environment.str_to_bool).
OFF = {"n", "no", "f", "false", "off", "0"}
ON = {"y", "yes", "t", "true", "on", "1"}
HARMLESS = {
    *("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"),
}
PRECISION, USE_CPU = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"
# `accelerate launch` itself sets the precision, the CPU and the dynamo variables.
EXPECTED = {
    PRECISION: {"no", "bf16", "fp16"},
    USE_CPU: ON | OFF,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"1"},
    "ACCELERATE_DYNAMO_BACKEND": {"no"},
    "ACCELERATE_DYNAMO_MODE": {"default"},
    "NVIDIA_TF32_OVERRIDE": {"0"},
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": {"0"},
    "CUBLAS_EMULATE_SINGLE_PRECISION": {"0"},
    # Another mode lets oneDNN, which reads both names, compute float32 in fewer bits.
    "ONEDNN_DEFAULT_FPMATH_MODE": {"strict"},
    "DNNL_DEFAULT_FPMATH_MODE": {"strict"},
}
# These may change results, at most in the last bits, and are recorded in run.json.
HONOURED = (
    *(PRECISION, USE_CPU, "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG"),
)
_ARITHMETIC = "cxrdist computes in float32, or in the accelerate config's mixed_precision"
_DATA_PARALLEL = "each rank holds the whole network; use distributed_type MULTI_GPU"
# The first prefix that matches a variable gives the fix.
MENDS = {
    PRECISION: "set mixed_precision in the accelerate config",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "a step has the recipe's global_batch_size images, "
    "and --max-images-per-rank splits them into micro-batches",
    "ACCELERATE_GRADIENT_CLIPPING": "use the recipe's max_gradient_norm to clip gradients",
    "ACCELERATE_DYNAMO_": "use the recipe's compile; take dynamo out of the accelerate config",
    "ACCELERATE_TORCH_DEVICE": "GPUs are chosen by CUDA_VISIBLE_DEVICES, the CPU by " + USE_CPU,
    "ACCELERATE_FP8_": _ARITHMETIC,
    "ACCELERATE_USE_": _DATA_PARALLEL,
    "ACCELERATE_DEEPSPEED_": _DATA_PARALLEL,
    "ACCELERATE_": "no option of cxrdist has this meaning",
    "FSDP_": _DATA_PARALLEL,
    "MEGATRON_LM_": _DATA_PARALLEL,
    "PARALLELISM_CONFIG_": _DATA_PARALLEL,
    "": _ARITHMETIC,
}


def refuse_settings(*, gpu: bool) -> None:
    """Reject environment variables that would make results differ from those of the recipe.

    On a machine without a GPU, fp16 is rejected, too: accelerate would silently use float32.
    """
    for name, value in sorted(os.environ.items()):
        expected = EXPECTED.get(name, OFF if name.startswith(KINDS) else None)
        # Accelerate ignores a precision in capitals.
        spelt = value if name == PRECISION else value.lower()
        if expected is None or name in HARMLESS or spelt in expected:
            continue
        # A switch has six spellings of each value, of which one is enough for a message.
        words = sorted(expected) if len(expected) < 4 else sorted(expected & {"yes", "no"})
        mend = next(mend for start, mend in MENDS.items() if name.startswith(start))
        raise CxrdistError(
            f"{name}={value}: would change results; expected {' or '.join(words)} or "
            f"not set; unset it: {mend}"
        )
    cpu = not gpu or os.environ.get(USE_CPU, "no").lower() in ON
    if cpu and os.environ.get(PRECISION) == "fp16":
        raise CxrdistError(
            f"{PRECISION}=fp16: needs a GPU, but this rank uses the CPU; {MENDS[PRECISION]} "
            "to no or bf16"
        )


def settings() -> dict[str, str]:
    """Return the honoured variables that are set, for run.json."""
    return {name: os.environ[name] for name in HONOURED if name in os.environ}
