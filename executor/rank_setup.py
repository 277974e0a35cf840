"""What a rank makes of its config, whatever its device: shapes, rows, what to record, first steps.

Shared by the worker and by the rehearsal that finds out which kernels a worker will launch.
"""

import torch

from executor.cuda_graphs import GraphPlan, graph_sizes, is_recordable
from executor.device import DTYPES
from executor.loader.loader import LoadedModel
from executor.memory import graph_temporaries_bytes
from executor.model_config import ModelShape
from executor.model_runner import ModelRunner
from executor.request_states import SLACK_TOKENS, RequestStates
from executor.warm_up import warm_up
from ipc.config import EngineConfig

# On a CPU there is nothing to verify or compile: a few tokens prove that a step works.
CPU_WARM_UP_TOKENS = 16


def shape_of(config: EngineConfig) -> ModelShape:
    """The model's shape, for memory and rows."""
    return ModelShape.from_hf(
        config.model_config.hf_config, max_model_len=config.model_config.resolved_max_model_len
    )


def dtype_of(config: EngineConfig) -> torch.dtype:
    """Of weights, activations and cache."""
    return DTYPES[config.model_config.dtype]


def make_states(config: EngineConfig, device: torch.device) -> RequestStates:
    """The rows."""
    scheduler = config.scheduler_config
    return RequestStates(
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=_max_row_len(config),
        block_size=config.cache_config.block_size,
        vocab_size=shape_of(config).vocab_size,
        device=device,
    )


def plan_graphs(config: EngineConfig, loaded: LoadedModel, *, tp_size: int) -> GraphPlan | None:
    """What steps are recorded on a GPU, None where all of them run eagerly."""
    if config.model_config.enforce_eager or not is_recordable(loaded.model):
        return None
    scheduler, item_size = config.scheduler_config, dtype_of(config).itemsize
    sizes = graph_sizes(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_seq_len=min(
            config.model_config.max_seq_len_to_capture, _max_row_len(config) + SLACK_TOKENS
        ),
        num_weights=loaded.weights_bytes // item_size,
    )
    return GraphPlan(
        sizes=sizes,
        temporaries_bytes=graph_temporaries_bytes(
            shape_of(config),
            tp_size=tp_size,
            max_tokens=sizes.max_tokens,
            max_requests=sizes.max_requests,
            item_size=item_size,
        ),
    )


def run_first_steps(config: EngineConfig, runner: ModelRunner, *, is_gpu: bool) -> None:
    """Run the steps of a start; on a GPU those after which nothing is left to compile."""
    scheduler = config.scheduler_config
    warm_up(
        runner,
        num_tokens=min(
            scheduler.max_num_batched_tokens,
            scheduler.max_num_batched_tokens if is_gpu else CPU_WARM_UP_TOKENS,
        ),
        max_model_len=config.model_config.resolved_max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        block_size=config.cache_config.block_size,
        is_thorough=is_gpu,
    )


def _max_row_len(config: EngineConfig) -> int:
    lookahead = config.scheduler_config.num_lookahead_slots
    return config.model_config.resolved_max_model_len + lookahead
