"""Cells of latents are compared with all cells of a source, wherever the content went."""

from __future__ import annotations

import itertools

import pytest
import torch

from far_env import latent_cells
from far_env.latent_cells import cell_distances, nearest_cells


@pytest.mark.parametrize("bytes_at_once", [2**27, 1])
def test_distances_are_those_of_loops_over_all_cells(monkeypatch, bytes_at_once):
    monkeypatch.setattr(latent_cells, "_BYTES", bytes_at_once)
    generator = torch.Generator().manual_seed(0)
    targets, sources = (torch.randn(2, count, 3, 2, 4, generator=generator) for count in (3, 5))
    distances, nearest = nearest_cells(targets, sources)
    assert distances.shape == nearest.shape == (2, 3, 5, 8) and distances.dtype == torch.float32
    for b, m, n in itertools.product(range(2), range(3), range(5)):
        for cell, (r, c) in enumerate(itertools.product(range(2), range(4))):
            squares = [
                float((targets[b, m, :, r, c] - sources[b, n, :, row, column]).square().sum())
                for row, column in itertools.product(range(2), range(4))
            ]
            assert distances[b, m, n, cell] == pytest.approx(min(squares), rel=1e-4, abs=1e-5)
            assert nearest[b, m, n, cell] == squares.index(min(squares))
    assert torch.equal(cell_distances(targets, sources), distances)


MOVES = {
    "down": lambda x: x.roll(3, dims=-2),
    "left": lambda x: x.roll(-2, dims=-1),
    "turned by 90 degrees": lambda x: x.rot90(1, dims=(-2, -1)),
    "turned by 180 degrees": lambda x: x.rot90(2, dims=(-2, -1)),
    "mirrored": lambda x: x.flip(-1),
    "zoomed in": lambda x: x[..., 2:6, 1:5].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_content_that_moved_in_any_way_is_found_and_other_content_is_not(move):
    generator = torch.Generator().manual_seed(1)
    frame, other = torch.randn(2, 4, 8, 8, generator=generator)
    found = cell_distances(move(frame)[None, None], torch.stack([frame, other])[None])[0, 0]
    assert found[0].max() < 1e-4 < 0.05 < found[1].median()
