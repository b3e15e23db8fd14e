"""Frames that look alike from their surroundings: what two kept frames' changes to their neighbours have in common.

The benchmark never compares two frames that are not neighbours. But a camera that comes back passes the same changes again, in
the same order or in reverse: two frames between which two changes on one side agree most likely show the same place.
"""

from __future__ import annotations

NUM_EDGES = 21
NUM_ROWS = 2
NUM_PLACE_EDGES = 1
NUM_PLACE_ROWS = 3
NUM_PATH_EDGES = 4
NUM_PATH_ROWS = 5


def compare(xp: object, remembered: object) -> tuple:
    """Compare every two frames; the same lines for torch in training and for NumPy in the exported file, where they are copied.

    Two changes differ by d, the distance of (temporal_similarity, squashed motion), and agree by exp(−d / scale). Four cases:
    both before the frames, both after, and one before with the other after. In each the nearest changes are compared, and the
    two nearest, which agree as the worse of both does.

    Args:
        xp: the module torch or numpy.
        remembered: a tensor or array (…, N, 19 or more), what a `HistoryMemory` with surroundings recalls; zero on padding.

    Returns:
        rows (…, N, 2): the best agreement of two changes with any other frame, and with a newer one. With places 3 more:
        whether a newer frame, an older one and the newest show the same place. With path 5 more: the same of points of the
        path, and how near the next other point is ahead and behind, 1 − distance / 8.
        edges (…, N, N, 21): the agreements of each case, of one change at both scales and of two; the best of two changes
        over the cases, at both scales; which frame is newer, log(1 + gap) / 3, and whether they are one. With places 1 more:
        whether they show the same. With path 4 more: whether frame i is at the point of frame j, at the next one ahead, at the
        next one behind, and how far ahead it is, as an eighth.
    """
    scales = (0.004, 0.03)
    second, first, after, later = ([remembered[..., 7 + 3 * place + part] for part in range(3)] for place in range(4))

    def differ(own: list, other: list) -> tuple:
        squares = [(own[part][..., :, None] - other[part][..., None, :]) ** 2 for part in range(2)]
        return xp.sqrt(squares[0] + squares[1] + 1e-12), own[2][..., :, None] * other[2][..., None, :]

    def elsewhere(alike: object) -> list:
        return [xp.amax(alike * xp.clip(-gap, 0, 1), -1), xp.amax(alike * xp.clip(gap, 0, 1), -1), alike[..., -1]]

    before, behind = (first, second), (after, later)
    edges, best = [], [None, None]
    for own, other in ((before, before), (behind, behind), (before, behind), (behind, before)):
        (near, near_known), (far, far_known) = differ(own[0], other[0]), differ(own[1], other[1])
        worse, known = xp.maximum(near, far), near_known * far_known
        edges += [xp.exp(-near / scale) * near_known for scale in scales]
        for index, scale in enumerate(scales):
            agreement = xp.exp(-worse / scale) * known
            edges.append(agreement)
            best[index] = agreement if best[index] is None else xp.maximum(best[index], agreement)
    birth = -xp.expm1(4 * remembered[..., 0])
    gap = birth[..., :, None] - birth[..., None, :]
    same = xp.exp(-20 * xp.abs(gap))
    edges += [*best, xp.clip(gap, -1, 1), xp.log1p(xp.abs(gap)) / 3, same]
    others = best[1] * (1 - same)
    rows = [xp.amax(others, -1), xp.amax(others * xp.clip(-gap, 0, 1), -1)]
    further = remembered.shape[-1] - 19  # 1 column of places, then 3 of path
    if further % 3:
        place = remembered[..., 19]
        alike = xp.exp(-1000 * xp.abs(place[..., :, None] - place[..., None, :]))
        edges.append(alike)
        rows += elsewhere(alike)
    if further > 2:
        point, ring, known = (remembered[..., part - 3] for part in range(3))
        both = known[..., :, None] * known[..., None, :]
        ahead, length = 8 * (point[..., :, None] - point[..., None, :]), 16 * ring[..., :, None]
        length = length + 1e6 * xp.clip(1 - length, 0, 1)
        ahead = ahead - length * xp.round(ahead / length - 1e-3)
        alike = xp.exp(-20 * ahead**2) * both
        rows += elsewhere(alike)
        rows += [xp.amax(xp.clip(1 + side / 8, 0, 1) * xp.clip(-side, 0, 1) * both, -1) for side in (ahead, -ahead)]
        edges += [alike, *(xp.exp(-20 * (ahead - side) ** 2) * both for side in (1, -1)), xp.clip(ahead / 8, -1, 1) * both]
    return xp.stack(rows, -1), xp.stack(edges, -1)
