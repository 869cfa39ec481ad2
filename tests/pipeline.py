"""vLLM's worker on a CPU as a stage of a pipeline. Where vLLM warms up on a GPU it makes room for
what a stage sends on; on a CPU it does not, and a second stage fails whatever the backend.
"""

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class Stage(CPUWorker):
    def load_model(self, *given, **named) -> None:
        super().load_model(*given, **named)
        runner = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
