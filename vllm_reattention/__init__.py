"""ReAttention for vLLM: training-free context extrapolation with a finite attention scope."""

__version__ = "0.1.0"
VLLM_RANGE = ">=0.32,<0.34"


def register() -> None:
    """vLLM's plugin entry point; runs in every process of every vLLM user who has us installed."""
    from vllm_reattention import compat, rope

    compat.install()
    rope.install()
