"""What rows read over copies, in all layers: ProphetKV's rule against one layer at a time."""

import numpy as np
import torch

from kvshare_sglang.bench.models import READER
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import row_scores
from kvshare_sglang.plan import Rows
from kvshare_sglang.policy.select.base import budget_rows, query_rows, required_rows
from kvshare_sglang.sim.engine import KV, Lab, Model


def test_prophetkv_takes_what_the_question_reads_over_all_layers():
    model, rng = Model(READER), np.random.default_rng(3)
    lab = Lab(model, KVShareConfig(min_reuse=16, min_share=0))
    text = rng.integers(10, 500, 200).astype(np.int32)
    lab.add(text)
    ids = np.concatenate([rng.integers(10, 500, n).astype(np.int32) for n in (9, 0, 12)])
    ids = np.concatenate([ids[:9], text, ids[9:]])
    plan = lab.plan(ids)
    assert plan.reused == 200
    copied = lab.copied(ids, plan)
    done = lab.prefill(ids, plan, "prophetkv", budget=0.2)

    must = required_rows(plan, suffix=lab.config.seam)
    question = must.clip(query_rows(plan, suffix=lab.config.seam).start, len(ids))
    masses = []
    for layer in range(len(model.layers)):  # each by a pass of its own that ends there
        kv = KV(copied.k.clone(), copied.v.clone())
        q = model.peek(ids, kv, must.positions, layer)[0][-question.num :]
        at = torch.as_tensor(question.positions)
        masses.append(row_scores.attention_mass(q, at, kv.k[layer], scaling=model.scaling))
    mass = torch.stack(masses).mean(0).numpy()
    open_rows = plan.reused_rows.positions
    count = budget_rows(plan.runs, prefix_len=plan.prefix_len, budget=0.2)
    best = Rows.at(np.sort(open_rows[np.argsort(-mass[open_rows])[:count]]))
    assert done.plan.compute == must | best
