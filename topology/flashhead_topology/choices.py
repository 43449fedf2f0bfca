"""What follows from a topology, and why: pure functions of a description.

Each choice says in one sentence what it stands on, so that a report can print it. Where a fact is
missing the choice is the one that always works, and the reason names the fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashhead_topology.machine import counted, short_gpu_name
from flashhead_topology.place import Host, Interface, Place, Topology


@dataclass(frozen=True)
class Choice:
    """A decision and the sentence for it. `value` is a word or a number for machines to read."""

    name: str
    value: Any
    reason: str


def all_choices(topology: Topology, shipped_systems: Sequence[str] = ()) -> list[Choice]:
    """Every choice, in the order in which a reader needs them."""
    choices = [
        choose_parallelism(topology),
        choose_exchange_path(topology),
        choose_cores(topology),
        choose_interface(topology),
    ]
    if shipped_systems:
        choices.append(choose_system(topology, shipped_systems))
    return choices


def describe_choices(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """JSON form."""
    return [asdict(choice) for choice in choices]


def choose_parallelism(topology: Topology) -> Choice:
    """How to lay tensor-parallel groups and pipeline stages: `(tp_size, pp_size)` of all ranks.

    A step of tensor parallelism exchanges in every layer, one of a pipeline between stages alone.
    So a tensor-parallel group stays where links are fastest, and stages go over the rest.
    """
    hosts = topology.hosts
    num_ranks = len(topology.places)
    if num_ranks == 1:
        return Choice("parallelism", (1, 1), "one rank: nothing to divide")
    sizes = {len(host.places) for host in hosts}
    if len(hosts) > 1 and len(sizes) > 1:
        return Choice(
            "parallelism",
            (num_ranks, 1),
            f"hosts hold {_listed(sizes)} ranks, and the stages of a pipeline need as many each",
        )
    if len(hosts) > 1:
        per_host = sizes.pop()
        inside = _inside(hosts[0], topology)
        return Choice(
            "parallelism",
            (per_host, len(hosts)),
            f"a tensor-parallel group of {per_host} on each of {len(hosts)} hosts, whose ranks "
            f"{inside}, and a pipeline stage a host, since the network between hosts is slower",
        )
    inside = _inside(hosts[0], topology)
    islands = _islands(topology)
    if len(islands) > 1 and len({len(island) for island in islands}) == 1:
        size = len(islands[0])
        return Choice(
            "parallelism",
            (size, len(islands)),
            f"{counted(len(islands), 'island')} of {counted(size, 'GPU')}, each on NVLink or under "
            "one switch: a tensor-parallel group in each, and a pipeline stage an island, since "
            "between them every message crosses a host bridge",
        )
    return Choice(
        "parallelism",
        (num_ranks, 1),
        f"one tensor-parallel group of {num_ranks}: all ranks are on one host and {inside}",
    )


def choose_exchange_path(topology: Topology) -> Choice:
    """What can carry packed keys between all ranks: `symmetric`, `nccl`, `gloo` or `none`.

    A forecast from links. A run asks the driver and proves the kernel (`exchange_choice`), and
    records what it took.
    """
    name = "key_exchange"
    ranks = range(len(topology.places))
    if len(ranks) == 1:
        return Choice(name, "none", "one rank: nothing is sent")
    if topology.device_type == "cpu":
        return Choice(name, "gloo", "not every rank has a GPU, and gloo serves the CPU")
    if len(topology.hosts) > 1:
        return Choice(
            name,
            "nccl",
            f"ranks on {len(topology.hosts)} hosts cannot write each other's memory, so NCCL "
            "carries the keys over the network",
        )
    paths = [topology.path(a, b) for a in ranks for b in ranks if a != b]
    if any(path is None or path.atomics is None for path in paths):
        return Choice(
            name, "nccl", "native atomics between the GPUs are not known, and NCCL needs none"
        )
    if not all(path.atomics for path in paths if path is not None):
        kinds = Counter(topology.symbol(a, b) for a in ranks for b in ranks if a < b)
        return Choice(
            name,
            "nccl",
            f"some pairs of GPUs have no native atomics ({_tally(kinds)}), which the exchange "
            "through shared memory signals by",
        )
    return Choice(
        name,
        "symmetric",
        f"all {len(ranks)} GPUs are on one host and work on each other's memory atomically "
        f"({topology.symbol(0, 1)}): one kernel through symmetric memory",
    )


def choose_cores(topology: Topology) -> Choice:
    """How many cores each rank of the fullest host can have to itself, next to its device."""
    fullest = max(topology.hosts, key=lambda host: len(host.places))
    places = fullest.places
    nodes = Counter(place.numa_nodes[0] for place in places if len(place.numa_nodes) == 1)
    cores = len(places[0].cores)
    if not cores:
        return Choice("cores", None, "the cores of this process are not known")
    each = max(1, cores // len(places))
    if len(places) > cores:
        return Choice(
            "cores",
            1,
            f"{counted(len(places), 'rank')} of a host take turns on {counted(cores, 'core')}",
        )
    if sum(nodes.values()) < len(places) or len(nodes) < 2:
        return Choice(
            "cores",
            each,
            f"{counted(len(places), 'rank')} share {counted(cores, 'core')} of a host"
            + ("" if nodes else ", whose NUMA nodes are not known"),
        )
    where = ", ".join(f"{count} near NUMA node {node}" for node, count in sorted(nodes.items()))
    return Choice(
        "cores",
        each,
        f"{counted(each, 'core')} a rank: {counted(len(places), 'rank')} on "
        f"{counted(cores, 'core')}, {where}; bind each to its own node",
    )


def choose_interface(topology: Topology) -> Choice:
    """The fastest way between hosts, by the name that NCCL or, on CPUs, gloo knows it by.

    None where there is none to choose.
    """
    if len(topology.hosts) == 1:
        return Choice("interface", None, "one host: nothing leaves it")
    common = [item for item in topology.places[0].interfaces if _everywhere(item, topology)]
    if topology.device_type == "cpu":
        common = [item for item in common if item.network_names]
    if not common:
        return Choice("interface", None, "no network interface goes by the same name on every host")
    known = [item for item in common if item.bits_per_s]
    if not known:
        return Choice(
            "interface",
            _name(common[0], topology),
            f"{common[0].name} is on every host; no interface tells its speed",
        )
    fastest = max(known, key=lambda item: item.bits_per_s or 0.0)
    alike = [item for item in known if item.bits_per_s == fastest.bits_per_s]
    return Choice(
        "interface",
        _name(fastest, topology),
        f"{counted(len(alike), 'adapter')} of {_rate(fastest)} on every host "
        f"({fastest.link_layer}), {len(alike) / len(topology.hosts[0].places):.3g} a rank",
    )


def choose_system(topology: Topology, names: Sequence[str]) -> Choice:
    """The shipped system that comes nearest, for a projection; None where none is near.

    names: as `systems.list_systems()` gives them, `<gpu>-<network>`.
    """
    if topology.device_type == "cpu":
        return Choice(
            "system", None, "no system is shipped for ranks on a CPU: calibrate makes one"
        )
    gpu = short_gpu_name(topology.places[0].device_name)
    near = [name for name in names if name.startswith(f"{gpu}-")]
    if not near:
        known = sorted({name.split("-")[0] for name in names})
        return Choice("system", None, f"no system is shipped for {gpu}, only for {_listed(known)}")
    layers = {item.link_layer for item in topology.places[0].interfaces}
    network = "infiniband" if "InfiniBand" in layers else "ethernet"
    chosen = next((name for name in near if name.endswith(network)), near[0])
    return Choice("system", chosen, f"its ranks are {gpu}, and its hosts are joined by {network}")


def _inside(host: Host, topology: Topology) -> str:
    """What joins the ranks of a host, in words."""
    if len(host.places) == 1:
        return "are alone"
    if topology.device_type == "cpu":
        return "share memory"
    kinds = topology.relations(host.ranks)
    if kinds == {"nvlink"}:
        return f"are all on NVLink ({topology.symbol(host.ranks[0], host.ranks[1])})"
    if "unknown" in kinds:
        return "are joined by what NVML does not tell"
    if "nvlink" in kinds:
        return "are on NVLink in part"
    return "are joined by PCIe"


def _islands(topology: Topology) -> list[list[int]]:
    """Ranks of one host in groups that are nearer to each other than through a host bridge."""
    near = {"nvlink", "switch", "switches"}
    if topology.device_type == "cpu" or topology.relations(_ranks(topology)) <= near:
        return [list(_ranks(topology))]
    islands: list[list[int]] = []
    for rank in _ranks(topology):
        for island in islands:
            if all(topology.relation(rank, other) in near for other in island):
                island.append(rank)
                break
        else:
            islands.append([rank])
    return islands if all(len(island) > 1 for island in islands) else [list(_ranks(topology))]


def _ranks(topology: Topology) -> range:
    return range(len(topology.places))


def _name(item: Interface, topology: Topology) -> str:
    return item.name if topology.device_type == "cuda" else item.network_names[0]


def _everywhere(item: Interface, topology: Topology) -> bool:
    return all(item.name in _names(host.places[0]) for host in topology.hosts)


def _names(place: Place) -> set[str]:
    return {item.name for item in place.interfaces}


def _rate(item: Interface) -> str:
    return "unknown speed" if not item.bits_per_s else f"{item.bits_per_s / 1e9:.3g} Gbit/s"


def _tally(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _listed(items: Sequence[Any] | set[int]) -> str:
    return ", ".join(str(item) for item in sorted(items))
