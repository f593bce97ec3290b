"""The blocks of a model, one after the other: loaded, looked at, unloaded, while the next one is being read."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from llmpare.compress import memory
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import from_info
from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.planning import Plan


class BrokenWeights(InputError):
    """The source holds NaN or infinities: nothing that was begun with it is worth resuming."""


class Walk:
    """The way of a source through its skeleton. One block is in memory at a time, and the next on its way."""

    def __init__(self, plan: Plan, source: Checkpoint, skeleton: Skeleton, clock: Clock) -> None:
        self._plan, self._source, self.skeleton, self._clock = plan, source, skeleton, clock
        self._first: dict[str, Tensor] | None = None

    def outside(self) -> dict[str, Tensor]:
        """Places embeddings, final norm and head, and block 0, which shows how blocks of this model behave.

        Returns the tensors that belong to no block.
        """
        with self._clock.phase("read"):
            tensors = self._read(self._plan.layout.outside)
            self.skeleton.place_outside(tensors)
            self._first = self._load(self._read(self._plan.layout.blocks[0]))
        return tensors

    def head(self) -> None:
        """Places what logits need once more, after the skeleton has let it go."""
        with self._clock.phase("read"):
            self.skeleton.place_head(self._read(tuple(self.skeleton.head())))

    def blocks(self) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        """(index, tensors as they are on disk) of every block in turn; it is loaded until the next is asked for.

        `outside` comes first. Close the iterator if it is left before its end. May be gone again.
        """
        names = self._plan.layout.blocks
        tensors, self._first = self._first, None
        if tensors is None:
            with self._clock.phase("read"):
                tensors = self._load(self._read(names[0]))
        ahead = self._plan.needs.way.ahead
        with ThreadPoolExecutor(1, "prefetch") as reader:
            for index in range(len(names)):
                more = index + 1 < len(names)
                coming = reader.submit(self._read, names[index + 1]) if more and ahead else None
                yield index, tensors
                tensors = {}
                self.skeleton.unload(index)
                memory.trim()  # even where freed memory is kept: from block to block its pieces would become more
                if more:
                    with self._clock.phase("read"):
                        tensors = self._load(coming.result() if coming is not None else self._read(names[index + 1]))

    def _load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.skeleton.place(tensors)
        return tensors

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of the source by name, on the CPU. Raises BrokenWeights for NaN and infinities.

        If they are allowed, those in weights that the run changes become 0, for the original model too.
        """
        tensors = {name: from_info(self._source.read(name), self._source.tensors[name]) for name in names}
        for name, tensor in tensors.items():
            # a finite sum has finite terms only; one that is not may have overflowed, so it is looked at closely
            if not tensor.is_floating_point() or _sum(tensor).isfinite():
                continue
            broken = int((~tensor.isfinite()).sum())
            if broken and not self._plan.request.allow_nonfinite:
                raise BrokenWeights(
                    f"{name} holds {broken} values that are NaN or infinite",
                    "the checkpoint is damaged; --allow-nonfinite counts them as 0 in linears",
                )
            if name in self._plan.changed:
                tensor.nan_to_num_(0.0, 0.0, 0.0)
        return tensors


def _sum(tensor: Tensor) -> Tensor:
    """Also of numbers of one byte, which torch does not add up."""
    return tensor.float().sum() if tensor.itemsize == 1 else tensor.sum()
