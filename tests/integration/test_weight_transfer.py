"""What replicas are sent before NCCL takes over, against vLLM's own types; the exchange needs GPUs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tiny_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


class Recorder:
    def __init__(self) -> None:
        self.posted: list[tuple[str, list[dict[str, Any]]]] = []

    def __call__(self, path: str, bodies: list[dict[str, Any]]) -> None:
        self.posted.append((path, bodies))


def test_the_group_and_its_messages() -> None:
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
    from vllm.entrypoints.rl.online.api_router import router

    from posttrain.rollout.transfer import ReplicaGroup, trainer_info

    with socket.create_server(("127.0.0.1", 0)) as server:
        info = trainer_info([f"http://127.0.0.1:{server.getsockname()[1]}"], [1, 4, 2])
    assert (info.backend, info.rank, info.is_sender, info.world_size) == ("nccl", 0, True, 8)
    assert info.master_address == "127.0.0.1"

    post = Recorder()
    group = ReplicaGroup(post, [1, 4, 2])
    assert isinstance(group, VLLMWeightSyncClient)
    first = NCCLWeightTransferInitInfo(
        master_address=info.master_address, master_port=info.master_port, rank_offset=1, world_size=8
    )
    group.init_weight_transfer_engine(worker_init_payload(first))
    group.start_weight_update()
    group.update_weights({"names": ["w"], "dtype_names": ["float32"], "shapes": [[2, 3]]})
    group.finish_weight_update()

    # One NCCL rank each: the trainer is 0, the replicas' workers are 1, 2 to 5, and 6 to 7.
    joined = [NCCLWeightTransferInitInfo(**body["init_info"]) for body in post.posted[0][1]]
    assert [one.rank_offset for one in joined] == [1, 2, 6]
    assert {one.world_size for one in joined} == {8}
    assert len({one.master_port for one in joined}) == 1
    NCCLWeightTransferUpdateInfo(**post.posted[2][1][0]["update_info"])
    paths = {route.path: route for route in router.routes}
    for path, bodies in post.posted:
        assert len(bodies) == 3
        assert paths[path].methods == {"POST"}
        required = {
            field.alias for field in paths[path].dependant.body_params if field.field_info.is_required()
        }
        assert required <= set(bodies[0]) <= {field.alias for field in paths[path].dependant.body_params}


def test_the_source_declares_what_it_gives(tmp_path: Path) -> None:
    from posttrain.rollout.transfer import PolicySource

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tiny"))
    source = PolicySource(model, torch.device("cpu"))
    for _ in range(2):  # every round sends the weights as they are then
        with torch.no_grad():
            model.lm_head.weight += 1.0
        given = dict(source)
        declared = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        assert declared == [(name, weight.dtype, tuple(weight.shape)) for name, weight in given.items()]
        assert given.keys() == model.state_dict().keys()
        assert torch.equal(given["lm_head.weight"], model.lm_head.weight)
