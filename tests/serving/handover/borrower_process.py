"""A borrower as a process of its own, that copies one lent chunk after the other until it is killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from chunk_store.layout import KVLayout
from serving.handover.borrower import Borrower
from serving.handover.lent import Lent, Offer
from serving.handover.metrics import BorrowerMetrics
from tests.serving.handover.lending import make_pool

ANSWER_S = 60.0


def run(pipe: Connection, layout: str) -> None:
    """Says its name, takes an offer, then copies every chunk that it is told of."""
    shape = KVLayout.from_canonical(layout)
    pool = make_pool(share=False, layout=shape)
    metrics = BorrowerMetrics(CollectorRegistry(), "model")

    def ask(name: str) -> Offer:
        pipe.send(name)
        offer: Offer = pipe.recv()
        return offer

    borrower = Borrower(shape, pool.device, ask, metrics)
    borrower.open()
    assert borrower._opening is not None
    borrower._opening.join()
    pipe.send(borrower.lenders)
    while True:
        lent: Lent = pipe.recv()
        planes = [
            torch.empty(lent.tokens, heads, dim, dtype=torch.bfloat16)
            for heads, dim in [(la.kv_heads, dim) for la in shape.layers for dim in (la.k_dim, la.v_dim)]
        ]
        borrower.copy(lent, planes)


class BorrowerProcess:
    """Another process that has a lender's pool open."""

    def __init__(self, offer: Any, layout: KVLayout) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run, args=(theirs, layout.canonical()), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(ANSWER_S)
        self.name: str = self.pipe.recv()
        self.pipe.send(offer(self.name))
        assert self.pipe.poll(ANSWER_S)
        assert self.pipe.recv() == 1, "it has no session"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(ANSWER_S)
