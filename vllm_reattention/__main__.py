"""What a length takes (plan), and whether an installation is sound (doctor)."""

import argparse
import sys


def main(words: list[str]) -> int:
    """0: it fits, or all is well; 1: not; 2: it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m vllm_reattention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what a context length takes, and how to serve it")
    plan.add_argument("model", help="a folder or a name, as vLLM takes it")
    plan.add_argument("--max-model-len", type=int, required=True)
    plan.add_argument("--gpus", type=int, default=1, help="for tensor parallelism")
    plan.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    plan.add_argument("--gpu-memory", type=float, help="GiB of each; that of this machine's")
    commands.add_parser("doctor", help="is this installation sound?")
    options = parser.parse_args(words)

    from vllm_reattention import doctor, register
    from vllm_reattention import plan as planning

    register()
    if options.command == "doctor":
        return doctor.main()
    gpu_bytes = planning.gpu_memory()
    if options.gpu_memory is not None:
        gpu_bytes = int(options.gpu_memory * planning.GIB)
    try:
        made = planning.make(
            options.model, options.max_model_len, options.gpus, options.kv_cache_dtype, gpu_bytes
        )
    except (ValueError, OSError) as reason:
        print(reason, file=sys.stderr)
        return 2
    print(planning.report(made))
    return 1 if made.fits is False else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
