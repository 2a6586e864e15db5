"""The protocol of ``docs/protocol.md`` on every execution that a weakly ordered processor may choose.

Each pattern is a few threads of loads, stores and fences, explored exhaustively. Three memories: "sc" runs programs in
order; "tso" lets a load pass earlier stores to other places (store buffers, as x86-64 has); "weak" lets any access pass
any earlier one, unless something orders the two (multi-copy atomic, as aarch64 is). What orders: a fence between them;
the first is an acquire load; the second is a release store; the same place; the second needs the first one's value for
what it stores, or is a store under a condition on it. A load under a condition may be made before the condition is
known.

Every pattern holds on all three, and each order that the page asks for is needed: weaken one, and an execution of
"weak" breaks the pattern. What compilers may do beyond that is not covered: they see C11 atomics.
"""
import itertools
from dataclasses import dataclass, replace
from typing import Callable, Tuple

import pytest

MEMORIES = ("sc", "tso", "weak")


@dataclass(frozen=True)
class Step:
    """One access. `value` of a store and `when` are functions of the thread's registers, `needs` those they read."""

    kind: str                               # load, store or fence
    place: str = ""
    register: str = ""
    value: Callable = None
    order: str = "relaxed"                  # or acquire, release
    needs: Tuple[str, ...] = ()
    when: Callable = None
    tag: str = ""


def load(register, place, order="relaxed", tag=""):
    return Step("load", place, register, order=order, tag=tag)


def store(place, value, order="relaxed", when=None, needs=(), tag=""):
    return Step("store", place, "", value if callable(value) else lambda _: value, order, tuple(needs), when, tag)


def fence(tag=""):
    return Step("fence", tag=tag)


def must_precede(first, second, memory):
    """Whether `second`, later in the program, waits for `first`."""
    if memory == "sc" or "fence" in (first.kind, second.kind):
        return True
    if first.place == second.place or (second.kind == "store" and first.register and first.register in second.needs):
        return True
    if memory == "tso":
        return not (first.kind == "store" and second.kind == "load")
    return first.order == "acquire" or second.order == "release"


def outcomes(threads, memory, initial):
    """Registers of all threads and the memory, after every execution."""
    before = [[[i for i in range(j) if must_precede(thread[i], thread[j], memory)] for j in range(len(thread))]
              for thread in threads]
    places = sorted({step.place for thread in threads for step in thread if step.place} | set(initial))
    start = (tuple(frozenset() for _ in threads), tuple(() for _ in threads),
             tuple(initial.get(place, 0) for place in places))
    seen, todo = {start}, [start]
    while todo:
        done, registers, content = todo.pop()
        if all(len(done[t]) == len(thread) for t, thread in enumerate(threads)):
            yield {name: value for thread in registers for name, value in thread}, dict(zip(places, content))
            continue
        for t, thread in enumerate(threads):
            for i, step in enumerate(thread):
                if i in done[t] or not all(j in done[t] for j in before[t][i]):
                    continue
                known, memory_after = dict(registers[t]), list(content)
                if step.kind == "load":
                    known[step.register] = content[places.index(step.place)]
                elif step.kind == "store" and (step.when is None or step.when(known)):
                    memory_after[places.index(step.place)] = step.value(known)
                state = (done[:t] + (done[t] | {i},) + done[t + 1:],
                         registers[:t] + (tuple(sorted(known.items())),) + registers[t + 1:], tuple(memory_after))
                if state not in seen:
                    seen.add(state)
                    todo.append(state)


@dataclass(frozen=True)
class Pattern:
    """Threads, what holds at their end, and which tagged orders they need."""

    threads: Tuple[Tuple[Step, ...], ...]
    holds: Callable                         # of registers and memory
    initial: Tuple[Tuple[str, int], ...] = ()

    def tags(self):
        return [step.tag for thread in self.threads for step in thread if step.tag]

    def without(self, tag):
        """The fence with this tag left out, or the access with it relaxed."""
        return replace(self, threads=tuple(
            tuple(replace(step, order="relaxed") if step.tag == tag else step for step in thread
                  if not (step.tag == tag and step.kind == "fence")) for thread in self.threads))

    def failures(self, memory):
        return [end for end in outcomes(self.threads, memory, dict(self.initial)) if not self.holds(*end)]


def is_even_and_same(r):
    return r["seq"] == r["again"] and r["seq"] % 2 == 0


# The owner changes two fields; a reader that found the sequence even and unchanged has both of one moment.
SEQUENCE = Pattern((
    (store("seq", 1), fence("owner: odd before the change"), store("a", 1), store("b", 1),
     store("seq", 2, "release", tag="owner: even after the change")),
    (load("seq", "seq", "acquire", tag="reader: fields after the first look"), load("x", "a"), load("y", "b"),
     fence("reader: second look after the fields"), load("again", "seq")),
), lambda r, _: not is_even_and_same(r) or (r["x"], r["y"]) == ((0, 0) if r["seq"] == 0 else (1, 1)))

# The owner retires a cache, looks at the hazard twice, and has its memory used anew (2) once it is free. A reader whose
# sequence is unchanged after it published its hazard never reads the new content.
HAZARD = Pattern((
    (store("seq", 1), fence("owner: retire before the hazard is read"), load("h", "hazard"),
     store("bytes", 2, when=lambda r: r["h"] == 0, needs=("h",)), store("seq", 2, "release"),
     load("h2", "hazard"), store("bytes", 2, when=lambda r: r["h2"] == 0, needs=("h2",))),
    (load("seq", "seq", "acquire"), store("hazard", 1, "release"), fence("reader: hazard before the second look"),
     load("again", "seq"), load("got", "bytes"),
     store("hazard", 0, "release", tag="reader: bytes before the hazard goes")),
), lambda r, _: not is_even_and_same(r) or r["seq"] != 0 or r["got"] == 1, (("bytes", 1),))

# The owner closes a lane, and frees what its hazard kept. A reader that does not find it closed has read nothing newer.
CLOSED = Pattern((
    (store("closed", 1), fence("owner: closed before anything is freed"), store("bytes", 2)),
    (load("got", "bytes"), fence("reader: closed after the bytes"), load("closed", "closed")),
), lambda r, _: r["closed"] == 1 or r["got"] == 1, (("bytes", 1),))

# A lane that the owner closes while the reader begins: the hazard is seen by the owner, or the end by the reader.
CLOSED_FIRST = Pattern((
    (store("closed", 1), fence("owner: closed before the hazards are read"), load("h", "hazard")),
    (store("hazard", 1, "release"), fence("reader: hazard before it looks for closed"), load("closed", "closed")),
), lambda r, _: r["h"] == 1 or r["closed"] == 1)

# A reader queues a key: whoever finds the ring longer finds the entry.
RING = Pattern((
    (store("entry", 7), store("head", 1, "release", tag="reader: entry before the head")),
    (load("head", "head", "acquire", tag="owner: entry after the head"), load("key", "entry")),
), lambda r, _: r["head"] == 0 or r["key"] == 7)

# The owner gives a place in the ring back; the reader that sees it writes the next entry there.
RING_FULL = Pattern((
    (load("tail", "tail", "acquire"), store("entry", 9, when=lambda r: r["tail"] == 1, needs=("tail",))),
    (load("key", "entry"), store("tail", 1, "release", tag="owner: entry before the tail")),
), lambda r, _: r["key"] == 7, (("entry", 7),))

# The bell is rung after the head: an owner that has heard it finds what it was rung for.
DOORBELL = Pattern((
    (store("head", 1, "release"), store("bell", 1, "release", tag="reader: head before the bell")),
    (load("bell", "bell", "acquire", tag="owner: rings after the bell"), load("head", "head", "acquire")),
), lambda r, _: r["bell"] == 0 or r["head"] == 1)

# A reader that sees a mark asks the owner, who then finds the released key in the ring.
MARK = Pattern((
    (store("entry", 7), store("head", 1, "release"), store("bell", 1, "release"),
     store("mark", 1, "release", tag="reader: all of the release before the mark")),
    (load("mark", "mark", "acquire", tag="other reader: asks after the mark"), load("bell", "bell"),
     load("head", "head", "acquire"), load("key", "entry")),
), lambda r, _: r["mark"] == 0 or (r["bell"], r["head"], r["key"]) == (1, 1, 7))

PATTERNS = {name.lower(): value for name, value in list(globals().items()) if isinstance(value, Pattern)}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_protocol_holds(name, memory):
    assert PATTERNS[name].failures(memory) == []


@pytest.mark.parametrize("name, tag", [(name, tag) for name, pattern in PATTERNS.items() for tag in pattern.tags()])
def test_each_order_is_needed(name, tag):
    weakened = PATTERNS[name].without(tag)
    assert weakened != PATTERNS[name]
    assert weakened.failures("weak")
    assert not weakened.failures("sc")


@pytest.mark.parametrize("name, tag", [
    ("hazard", "owner: retire before the hazard is read"), ("hazard", "reader: hazard before the second look"),
    ("closed_first", "owner: closed before the hazards are read"),
    ("closed_first", "reader: hazard before it looks for closed"),
])
def test_store_buffers_alone_need_these(name, tag):
    """A store that a later load must not pass: x86-64 needs the fence too."""
    assert PATTERNS[name].without(tag).failures("tso")


def test_rings_read_before_the_bell_lose_it():
    """The order in which the owner looks counts: the other way round it would take a ring for heard."""
    first, second = DOORBELL.threads
    assert replace(DOORBELL, threads=(first, second[::-1])).failures("sc")


# ------------------------------------------------------------------------------------------------- the model itself

def results(threads, memory, *names):
    return {tuple(r[name] for name in names) for r, _ in outcomes(threads, memory, {})}


def test_store_buffering():
    threads = ((store("x", 1), load("a", "y")), (store("y", 1), load("b", "x")))
    assert (0, 0) not in results(threads, "sc", "a", "b")
    assert (0, 0) in results(threads, "tso", "a", "b")
    fenced = tuple((thread[0], fence(), thread[1]) for thread in threads)
    assert (0, 0) not in results(fenced, "weak", "a", "b")


def test_message_passing():
    threads = ((store("x", 1), store("flag", 1)), (load("a", "flag"), load("b", "x")))
    assert (1, 0) not in results(threads, "tso", "a", "b")
    assert (1, 0) in results(threads, "weak", "a", "b")


def test_load_buffering():
    threads = tuple((load(a, x), store(y, 1)) for a, x, y in (("a", "x", "y"), ("b", "y", "x")))
    assert (1, 1) not in results(threads, "tso", "a", "b")
    assert (1, 1) in results(threads, "weak", "a", "b")


def test_coherence_and_dependencies():
    """One place is read in order, and a store that needs a load comes after it."""
    for memory in MEMORIES:
        assert (1, 0) not in results(((store("x", 1),), (load("a", "x"), load("b", "x"))), memory, "a", "b")
        looped = tuple((load(a, x), store(y, lambda r, a=a: r[a], needs=(a,)))
                       for a, x, y in (("a", "x", "y"), ("b", "y", "x")))
        assert results(looped, memory, "a", "b") == {(0, 0)}


def test_every_interleaving_is_visited():
    """Three threads of two stores each: as many last writers and values as there are."""
    threads = tuple(tuple(store("x", 10 * t + i) for i in range(2)) for t in range(3))
    ends = {memory["x"] for _, memory in outcomes(threads, "sc", {})}
    assert ends == {1, 11, 21}
    assert list(itertools.islice(outcomes(threads, "weak", {}), 1))
