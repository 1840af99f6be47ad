"""Whether a selection is one that SPEC 3 allows, followed step by step in float64."""

import math

import torch

from fuzz.verdict import Fault


def check_selection(call, results):
    """Raise Fault unless every example read the best entries, in order, and stopped rightly."""
    query, keys = call["query"].double(), call["keys"].double()
    for i in range(len(query)):
        own = keys if keys.dim() == 2 else keys[i]
        unread = torch.ones(len(own), dtype=torch.bool)
        if call["read_mask"] is not None:
            unread &= ~call["read_mask"][i]
        if call["bank_lens"] is not None:
            unread &= torch.arange(len(own)) < call["bank_lens"][i]
        eps = torch.finfo(results["weights"].dtype).eps
        _Follower(call, query[i], own, unread, eps).follow(
            i, results["indices"][i], int(results["counts"][i])
        )


class _Follower:
    """Reads along with one example."""

    def __init__(self, call, query, keys, unread, eps):
        self.call, self.query, self.keys, self.unread, self.eps = call, query, keys, unread, eps
        self.halting, self.scale = 0.0, query.abs()

    def follow(self, example, indices, count):
        steps, topk = indices.shape
        place = f"example {example}"
        _check(0 <= count <= steps, f"{place}: count {count}", "count")
        _check(bool((indices[count:] == -1).all()), f"{place}: unused indices are not -1", "unused")
        for step in range(count):
            _check(self.may_go_on(step), f"{place}: a step {step} after the end", "halting")
            chosen = indices[step].tolist()
            _check(len(set(chosen)) == topk, f"{place}, step {step}: read twice {chosen}", "twice")
            self.take(chosen, f"{place}, step {step}")
        _check(count == steps or self.may_stop(count), f"{place}: stopped after {count}", "halting")

    def may_go_on(self, step):
        enough = int(self.unread.sum()) >= self.call["topk"]
        return enough and self.halting < self.call["halt_threshold"] + self.slack(step)

    def may_stop(self, step):
        enough = int(self.unread.sum()) >= self.call["topk"]
        return not enough or not self.halting < self.call["halt_threshold"] - self.slack(step)

    def slack(self, step):
        """How far rounding may carry the halting score: not at all where every step adds 1."""
        if self.call["topk"] == 1 or step == 0 or not math.isfinite(self.call["halt_threshold"]):
            return 0.0
        return step * (64 * self.eps + self.weight_slack)

    def take(self, chosen, place):
        """Check the entries of one step, then move the query as the definition says."""
        width = len(self.query)
        scores = (self.keys * self.query).sum(1)
        # Bounds on what summing in another order, and an earlier step's rounding, may change.
        size = (self.keys.abs() * self.scale).sum(1)
        slack = (4 * (width + 8) * self.eps * size).nan_to_num(0.0, 0.0, 0.0)
        slack = slack + width * torch.finfo(torch.float32).tiny  # what is smaller may become 0
        self.weight_slack = float(slack.amax()) / math.sqrt(width) if len(slack) else 0.0
        left = self.unread.clone()
        for entry in chosen:
            inside = 0 <= entry < len(left) and bool(left[entry])
            _check(inside, f"{place}: entry {entry} may not be read", "entry")
            self._check_best(entry, left, scores, slack, place)
            left[entry] = False
        self.unread = left
        rows = self.keys[chosen]
        w = torch.softmax(scores[chosen] / math.sqrt(width), 0)
        self.halting += float(w[0])
        merged = (w.unsqueeze(1) * rows).sum(0)
        self.scale = self.scale + rows.abs().amax(0)
        self.query = (self.query + merged) / 2 if self.call["average_query"] else merged

    def _check_best(self, entry, left, scores, slack, place):
        mine = scores[entry]
        others = left & ~scores.isnan()
        if mine.isnan():
            _check(not others.any(), f"{place}: NaN before numbers, entry {entry}", "order")
            better = left
        else:
            better = others & (scores - slack > mine + slack[entry])
            text = f"{place}: entry {entry} of score {mine:.9g}"
            _check(not better.any(), f"{text}, better {better.nonzero()[:1].tolist()}", "order")
            better = left & (self.keys == self.keys[entry]).all(1)
        lower = better[:entry].nonzero()
        _check(not len(lower), f"{place}: {entry} before its equal {lower[:1].tolist()}", "ties")


def _check(condition, text, kind):
    if not condition:
        raise Fault(f"wrong selection {kind}", text)
