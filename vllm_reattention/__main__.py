"""Plan memory for a context length, see which layers look for facts, check the installation."""

import argparse
import sys


def main(words: list[str]) -> int:
    """Exit status. 0: it fits, or all is well; 1: it does not; 2: the question has no answer."""
    parser = argparse.ArgumentParser(prog="python -m vllm_reattention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="memory of a context length, and the command")
    plan.add_argument("model", help="a folder or a name, as vLLM takes it")
    plan.add_argument("--max-model-len", type=int, required=True)
    plan.add_argument("--gpus", type=int, default=1, help="number, for tensor parallelism")
    plan.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    plan.add_argument("--gpu-memory", type=float, help="GiB of each (default: this GPU's)")
    layers = commands.add_parser(
        "layers", help="which layers look for facts: candidates for select_layers"
    )
    layers.add_argument("model", help="a folder or a name, as Transformers takes it")
    commands.add_parser("doctor", help="check this installation")
    options = parser.parse_args(words)
    try:
        return {"plan": _plan, "layers": _layers, "doctor": _doctor}[options.command](options)
    except (ValueError, OSError) as reason:
        print(reason, file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace) -> int:
    from vllm_reattention import plan, register

    register()
    gpu_bytes = plan.gpu_memory()
    if options.gpu_memory is not None:
        gpu_bytes = int(options.gpu_memory * plan.GIB)
    made = plan.make(
        options.model, options.max_model_len, options.gpus, options.kv_cache_dtype, gpu_bytes
    )
    print(plan.report(made))
    return 1 if made.fits is False else 0


def _layers(options: argparse.Namespace) -> int:
    from vllm_reattention import layers

    print(layers.report(options.model))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from vllm_reattention import doctor, register

    register()
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
