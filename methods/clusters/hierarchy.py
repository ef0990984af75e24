"""A hierarchy of clusters: those of each level are clusters of the prototypes below."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.clusters.kmeans import kmeans, own_share
from kilobatch.methods.clusters.prototypes import Prototypes, gather_assignment


class Hierarchy(nn.Module):
    """Levels of prototypes, the lowest first: as HCSC's authors make them (gyfastas/HCSC, pretrain.py, run_hkmeans).

    The lowest are clusters of all images' features, those of a further level clusters of the unit prototypes of the
    level below. An image is in the cluster of its cluster. A level's phi is of the distances of what it clusters.
    """

    levels: nn.ModuleList

    def __init__(self, images: int, counts: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Prototypes(images, count, dim) for count in counts)
        for level, count in enumerate(counts[:-1]):
            self.register_buffer(f"parent_{level}", torch.zeros(count, dtype=torch.int32))

    def prototypes(self) -> list[Prototypes]:
        return [level for level in self.levels if isinstance(level, Prototypes)]

    def parents(self, level: int) -> Tensor:
        """(K,) int64: of each prototype of a level but the highest, its cluster in the level above."""
        return self.get_buffer(f"parent_{level}").long()

    @torch.no_grad()
    def fill(
        self,
        index: Tensor,
        rows: Tensor,
        temperature: float,
        rounds: int,
        redos: int,
        go_on: Callable[[str, int, int], None],
    ) -> None:
        """Clusters this rank's rows (n, D) of the images index (n,). Buffers change last; go_on may end it before."""
        images = len(self.prototypes()[0].assignment)
        assignments, results, parents = list[Tensor](), list[partial[None]](), list[Tensor]()
        for level, prototypes in enumerate(self.prototypes()):
            count = len(prototypes.phi)
            told = partial(go_on, f"k-means of {count} clusters")
            found = kmeans(index, rows, count, key=level, rounds=rounds, redos=redos, go_on=told)
            if level == 0:
                assignments.append(gather_assignment(index, found, images))
            else:
                parents.append(gather_assignment(index, found, len(self.prototypes()[level - 1].phi)))
                assignments.append(parents[-1][assignments[-1].long()])
            results.append(partial(prototypes.fill, assignments[-1], found, temperature))
            rows = F.normalize(found.centroids, dim=1)
            index = own_share(count, rows.device)
            rows = rows[index]
        for level, parent in enumerate(parents):
            self.get_buffer(f"parent_{level}").copy_(parent)
        for take_over in results:
            take_over()
