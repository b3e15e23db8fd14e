"""Comparison of kept frames by their surroundings: how similar the changes to their neighbours are.

The benchmark only compares neighbouring frames. But when a camera returns, the same changes occur again, in the same order or
in reverse: two frames for which two changes on one side agree most likely show the same place.
"""

from __future__ import annotations

NUM_EDGES = 21
NUM_ROWS = 2
NUM_PLACE_EDGES = 1
NUM_PLACE_ROWS = 3
NUM_PATH_EDGES = 4
NUM_PATH_ROWS = 5


def compare(xp: object, remembered: object) -> tuple:
    """Compare every two frames: with torch in training, with NumPy in exported files, which contain this function's source.

    Two changes differ by d, the distance of (temporal_similarity, squashed motion), and agree by exp(−d / scale). Four cases:
    both before the frames, both after, and one before with the other after. In each case the nearest changes are compared, and
    the two nearest, whose agreement is that of the worse pair.

    Args:
        xp: the module torch or numpy.
        remembered: a tensor or array (…, N, 19 or more), the columns of a `HistoryMemory` with surroundings; zero on padding.

    Returns:
        rows (…, N, 2): the best agreement of two changes with any other frame, and with a newer one. With places 3 more:
        whether a newer frame, an older one and the newest show the same place. With path 5 more: the same for points of the
        path, and how near the next other frame is ahead and behind on the path, 1 − distance / 8.
        edges (…, N, N, 21): the agreements of each case, of one change at both scales and of two; the best of two changes
        over the cases, at both scales; which frame is newer, log(1 + gap) / 3, and whether they are the same frame. With places
        1 more: whether they show the same place. With path 4 more: whether frame i is at the point of frame j, at the next one
        ahead, at the next one behind, and how far ahead it is, divided by 8.
    """
    scales = (0.004, 0.03)
    second, first, after, later = ([remembered[..., 7 + 3 * place + part] for part in range(3)] for place in range(4))

    def differ(one: list, other: list) -> tuple:
        squares = [(one[part][..., :, None] - other[part][..., None, :]) ** 2 for part in range(2)]
        return xp.sqrt(squares[0] + squares[1] + 1e-12), one[2][..., :, None] * other[2][..., None, :]

    def matches(same_place: object) -> list:
        newer, older = same_place * xp.clip(-gap, 0, 1), same_place * xp.clip(gap, 0, 1)
        return [xp.amax(newer, -1), xp.amax(older, -1), same_place[..., -1]]

    before, behind = (first, second), (after, later)
    edges, best = [], [None, None]
    for one, other in ((before, before), (behind, behind), (before, behind), (behind, before)):
        (near, near_known), (far, far_known) = differ(one[0], other[0]), differ(one[1], other[1])
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
        same_place = xp.exp(-1000 * xp.abs(place[..., :, None] - place[..., None, :]))
        edges.append(same_place)
        rows += matches(same_place)
    if further > 2:
        point, ring, known = (remembered[..., part - 3] for part in range(3))
        both = known[..., :, None] * known[..., None, :]
        ahead, length = 8 * (point[..., :, None] - point[..., None, :]), 16 * ring[..., :, None]
        length = length + 1e6 * xp.clip(1 - length, 0, 1)
        ahead = ahead - length * xp.round(ahead / length - 1e-3)
        same_point = xp.exp(-20 * ahead**2) * both
        rows += matches(same_point)
        rows += [xp.amax(xp.clip(1 + side / 8, 0, 1) * xp.clip(-side, 0, 1) * both, -1) for side in (ahead, -ahead)]
        edges += [same_point, *(xp.exp(-20 * (ahead - side) ** 2) * both for side in (1, -1)), xp.clip(ahead / 8, -1, 1) * both]
    return xp.stack(rows, -1), xp.stack(edges, -1)
