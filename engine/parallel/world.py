"""Many processes as one: the mesh, parameters sharded by FSDP2, and what the ranks agree on.

Mesh dimensions: dp_replicate (copies of the parameters), dp_shard (parameters and data), sp (a
sample's rows; parameters too), cfg (prompt and null of guided sampling). Ranks count through them
with cfg fastest. Under torchrun, NCCL on GPUs and gloo on CPUs.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from engine.config import MeshConfig
from engine.errors import UsageError
from engine.parallel.liveness import Peers
from engine.parallel.sequence import Sequence, all_gather_single, heads_over
from engine.parallel.torchrun import restarts

TRIAL = timedelta(minutes=30)  # that rank 0 may take to choose kernels: each may take minutes


class RankShard(NamedTuple):
    """A parameter cut over ranks: all its rows in dimension 0, and where this rank's start."""

    rows: int
    start: int


@dataclass
class World:
    """One of the processes.

    data_rank: which share of a batch it has.
    data_size: into how many shares a batch is cut.
    asked: how often nodes were asked for something: a store keeps what it was told.
    """

    config: MeshConfig
    device: torch.device
    store: dist.Store
    rank: int
    size: int
    peers: Peers | None = None
    asked: int = 0

    @classmethod
    def start(cls, config: MeshConfig, device_type: str, timeout: float = 600.0) -> "World":
        """Joins the others.

        config: how the processes are arranged.
        device_type: "cuda" or "cpu".
        timeout: seconds that a collective may take.

        Errors: UsageError."""
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store, with what a failed attempt left there, for the next one.
        store = dist.PrefixStore(f"attempt{restarts()}", store)
        shape = config.shape(size)
        device = torch.device(device_type)
        if device_type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        peers = Peers(store, rank, size)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        return cls(MeshConfig(*shape), device, store, rank, size, peers)

    def stop(self) -> None:
        self.peers.stop()
        dist.destroy_process_group()

    def named_failures(self):
        """A context in which what fails because another rank has died is a `LostRank` that
        names it."""
        return self.peers.named()

    @property
    def data_size(self) -> int:
        return self.config.dp_replicate * self.config.dp_shard

    @property
    def data_rank(self) -> int:
        return self.rank // (self.config.sp * self.config.cfg)

    def _grid(self, **dimensions: int) -> dist.DeviceMesh:
        """The ranks as a grid, the last dimension fastest. A fake mode would make its numbers fake:
        it is suspended."""
        with unset_fake_temporarily():
            return init_device_mesh(
                self.device.type, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions)
            )

    @cached_property
    def mesh(self) -> dist.DeviceMesh:
        return self._grid(**asdict(self.config))

    @cached_property
    def weights(self) -> dist.DeviceMesh:
        """What a parameter is spread over: (dp_replicate, shard), or shard alone."""
        c = self.config
        mesh = self._grid(dp_replicate=c.dp_replicate, shard=c.dp_shard * c.sp, cfg=c.cfg)
        return mesh["dp_replicate", "shard"] if c.dp_replicate > 1 else mesh["shard"]

    def sequence(self, heads: int) -> Sequence | None:
        """How samples are spread over the dimension sp; None where a rank has them whole."""
        sp, u = self.config.sp, heads_over(heads, self.config.sp)
        if sp == 1:
            return None
        mesh = self._grid(data=self.data_size, across=sp // u, ulysses=u, cfg=self.config.cfg)
        groups = mesh.get_group("ulysses"), mesh.get_group("across")
        return Sequence(self.mesh.get_group("sp"), *groups, u)

    def check_same(self, what: str, record: dict) -> None:
        """Errors: UsageError where this rank's record is not that of rank 0."""
        if self.rank == 0:
            self.store.set(f"agree/{what}", json.dumps(record))
        theirs = json.loads(self.store.get(f"agree/{what}"))
        mine = json.loads(json.dumps(record))
        different = sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
        if different:
            raise UsageError(
                f"parallel: {what} must be the same on all ranks; got another "
                f"{', '.join(different)} on rank {self.rank}. Start all with the same flags."
            )

    def once(self, what: str, make: Callable[[], str]) -> str:
        """What rank 0 makes, on all ranks; the others wait for it, TRIAL at most. what: a name of
        its own among all that is made so."""
        key = f"once/{what}"
        if self.rank == 0:
            self.store.set(key, make())
        self.store.wait([key], TRIAL)
        return self.store.get(key).decode()

    def on_each_node(self, what: str, make: Callable[[], str]) -> list[str]:
        """What the first rank of every node makes, on all ranks, in the order of the ranks; the
        others wait for it, TRIAL at most. Every rank must call it."""
        self.asked += 1
        keys = [f"node/{self.asked}/{what}/{rank}" for rank in range(self.size)]
        first = dist.get_node_local_rank(fallback_rank=0) == 0
        self.store.set(keys[self.rank], "+" + make() if first else "-")
        self.store.wait(keys, TRIAL)
        found = [made.decode() for made in self.store.multi_get(keys)]
        return [made[1:] for made in found if made[0] == "+"]

    def any(self, flag: bool) -> Tensor:
        """Whether it is set on any rank, 0-d on the device: 1.0 or 0.0. The host of a GPU does not
        wait; every rank must call it."""
        found = torch.full((), float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found


class Sharding:
    """What FSDP2 made of an objective's parameters.

    shards: of those that are spread over the ranks, by name. The others, norms and modulation
    tables, are whole on every rank, in fp32: their bytes are few, the block before them reads
    them, and bf16 would round weights that are near 1.
    """

    def __init__(self, objective: nn.Module, world: World):
        model, config = objective.model, world.config
        ranks = config.dp_shard * config.sp
        over = world.weights
        self.group = over.get_group("shard")
        self.replicas = config.dp_replicate

        networks = objective.networks
        named = {f"{k}{n}": p for k, net in networks.items() for n, p in net.named_parameters()}
        whole = {p for name, p in named.items() if "norm" in name or "scale_shift_table" in name}
        for p in whole:  # FSDP takes the others to the device
            p.data = p.data.to(world.device)

        half = None if model.dtype == model.wide_dtype else model.dtype
        narrow = MixedPrecisionPolicy(half, half and model.wide_dtype, cast_forward_inputs=False)
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        nets = networks.values()
        times = [part for net in nets for part in (net.time_embedding_v, net.time_embedding_t)]
        units = [part for net in nets for part in (*net.blocks, net.vocab_embed, net.text_head)]
        for unit in (*times, *units, objective):
            for p in unit.parameters():  # unit by unit, so that no two copies of all are alive
                if p.requires_grad and p not in whole and not isinstance(p, DTensor):
                    p.data = p.data.to(model.wide_dtype)  # the masters; bf16 is what FSDP gathers
            policy = wide if unit in times else narrow
            fully_shard(unit, mesh=over, mp_policy=policy, ignored_params=whole)

        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the losses are addends of global means
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        for net in nets:
            for block, following in pairwise(net.blocks):
                block.set_modules_to_forward_prefetch([following])

        self.shards = {}
        named = {f"{k}{n}": p for k, net in networks.items() for n, p in net.named_parameters()}
        for name, p in named.items():
            if isinstance(p, DTensor):
                start = min(len(p), -(-len(p) // ranks) * dist.get_rank(self.group))
                self.shards[name] = RankShard(len(p), start)

    def local(self, name: str, p: Tensor) -> Tensor:
        """This rank's rows."""
        return p.to_local() if name in self.shards else p

    @torch.no_grad()
    def whole(self, name: str, rows: Tensor) -> Tensor:
        """All rows, on every rank of the group."""
        if name not in self.shards:
            return rows
        ranks, total = dist.get_world_size(self.group), self.shards[name].rows
        padded = rows.new_zeros(-(-total // ranks), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = rows.new_empty(ranks * len(padded), *rows.shape[1:])
        all_gather_single(found, padded, self.group)
        return found[:total]


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sums in place, in one collective."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
