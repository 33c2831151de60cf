"""Causes of other weights than the run had, of other settings, and of copies that differ."""

from collections.abc import Mapping
from typing import Any

from megatron_embed.audit.case import Case, Cause, of_ranks

_SHOWN = 3


def explain(case: Case) -> list[Cause]:
    """Causes in the checkpoint, the first weights or the settings."""
    found = [Cause(name="changed file of the checkpoint", text=problem) for problem in case.problems
             if "config.yaml" not in problem]
    changed = [problem for problem in case.problems if "config.yaml" in problem]
    found += [Cause(name="changed configuration", text="; ".join(changed))] if changed else []
    if case.difference.part == "optimizer state":
        return [Cause(name="stale optimizer state in the checkpoint", text="the moments in the checkpoint are not "
                      "those that the run had in memory when it saved; the weights are")]
    if case.difference.part != "weights" or found:
        return found
    save, start = case.log.saves.get(case.done), case.log.starts.get(case.done)
    if save is not None and start is not None and save["parameter_bits"] != start["parameter_bits"]:
        return [Cause(name="weights not restored at the resume", text=f"the run went on after step {case.done} with "
                      f"other weights (norm {start['parameter_norm']:.8g}) than those that it had saved (norm "
                      f"{save['parameter_norm']:.8g})")]
    for done in sorted({*case.log.steps, *case.log.saves}):
        record = {**case.log.steps.get(done, {}), **case.log.saves.get(done, {})}
        if done <= case.done and "drifted" in record:
            return [Cause(name="drifted parameters", text="the copies of the parameters on "
                          f"{of_ranks(record['drifted'])} are not equal since step {done}, so the checkpoint holds a "
                          f"mixture of them; audit step {done} to see which one is wrong")]
    bits = f"{case.replay.checksum().bits % 2**64:016x}"
    for kind, records in (("start", case.log.starts), ("step", case.log.steps), ("save", case.log.saves)):
        for step, record in records.items():
            if record.get("parameter_bits") == bits and (step != case.done or kind == "start"):
                return [Cause(name="stale weights in the checkpoint", text=f"they are the run's weights after {step} "
                              f"steps, not after {case.done}")]
    return _named_tensors(case)


def _named_tensors(case: Case) -> list[Cause]:
    """Causes by tensor: those that differ, where the log has them one by one."""
    record = case.log.saves.get(case.done) if case.done else None
    if record is None:
        return [Cause(name="other first weights", text="the weights of model.path are not those that the run began "
                      "with")] if not case.done else []
    saved, now = record["save"], case.replay.checksums_by_name()
    different = [name for name, (bits, _) in now.items() if name not in saved or saved[name][0] != bits]
    before = [other["save"] for done, other in sorted(case.log.saves.items(), reverse=True) if done < case.done]
    stale = [name for name in different if before and before[0].get(name, [None])[0] == now[name][0]]
    names = ", ".join(different[:_SHOWN]) + (", ..." if len(different) > _SHOWN else "")
    if different and len(stale) == len(different):
        return [Cause(name="stale weights in the checkpoint", text=f"{len(different)} of {len(now)} tensors are those "
                      f"of the checkpoint before: {names}")]
    return [Cause(name="other weights in the checkpoint", text=f"{len(different)} of {len(now)} tensors are not as the "
                  f"run had them in memory when it saved ({names}); each file is as it was written")]


def differing_copies(case: Case) -> list[Cause]:
    """Causes by rank: those whose values differ from the ranks' that should have the same."""
    record = case.record
    if record.get("replica_differs"):
        return [Cause(name="ranks of a replica with different rows", text="tensor-, pipeline- or context-parallel "
                      "ranks of one replica were given different rows or texts")]
    norms: Mapping[str, float] = record.get("drifted", {})
    ranks, expected = [int(rank) for rank in norms], case.replay.checksum().own_norm
    if norms and len(norms) > 1:  # no majority: the replay decides which copy is the right one
        furthest = max(norms, key=lambda rank: abs(norms[rank] - expected))
        ranks = [int(furthest)]
    return [Cause(name="drifted parameters", text=f"{of_ranks(ranks)}: the copy of the "
                  f"parameters is not equal to those of the other replicas, first seen at step {case.step}")]


def noted_facts(case: Case) -> list[Cause]:
    """Settings of the objects that the run was made of which are not those that its configuration gives."""
    noted: Mapping[str, Any] = case.start.get("objects", {})
    now = case.replay.objects()
    return [Cause(name=f"other setting: {key}", text=f"the run had {key} = {noted[key]}, its configuration gives "
                  f"{now[key]}") for key in noted if key in now and noted[key] != now[key]]
