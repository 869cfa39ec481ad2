"""Requests that write given tokens: decoding a known text, to see how likely each token was.

For vLLM's `logits_processors`; a request's tokens stand in its `extra_args["forced"]`. Log
probabilities are told as they were before (`logprobs_mode` raw_logprobs, vLLM's default).
"""

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        tokens = (params.extra_args or {}).get("forced")
        if tokens is None:
            return None

        def force(written: list[int], logits: Tensor) -> Tensor:
            # vLLM may sample once more than it is asked to, ahead of knowing that it is done
            token = tokens[min(len(written), len(tokens) - 1)]
            return torch.full_like(logits, float("-inf")).index_fill_(
                0, torch.tensor([token], device=logits.device), 0.0
            )

        return force
