"""Which environment variables of the supervisor the ranks on other hosts get."""

from __future__ import annotations

from collections.abc import Mapping

# Variables of the libraries that ranks use, and of the storages and trackers that they write to;
# docs/several_machines.md lists them, too.
_PREFIXES = (
    "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "MALLOC_",
    "TRITON_", "DEEPSPEED_", "DS_", "HF_", "HUGGINGFACE_", "WANDB_", "COMET_", "TIKTOKEN_", "AWS_", "GOOGLE_",
    "GCS_", "AZURE_", "FSSPEC_", "LC_",
)  # fmt: skip
_NAMES = {
    "LANG", "TZ", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
}  # fmt: skip
# Of this machine or this process only.
_NOT_PASSED = ("CUDA_VISIBLE_DEVICES", "DS_GPT2_")


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ``environment`` that the ranks on other hosts get."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _NAMES or name.startswith(_PREFIXES)) and not name.startswith(_NOT_PASSED)
    }
