"""The paper's fourteen claims, each answered from what the studies measured and from nothing else."""

from __future__ import annotations

from kalmagrove.reproduction import optimizer_claims, part_claims, table_claims
from kalmagrove.reproduction.answers import Answer, Verdict
from kalmagrove.reproduction.evidence import Evidence
from kalmagrove.reproduction.pairs import pairs_elsewhere, pairs_of
from kalmagrove.scaling.claims import scaling_claims


def answer_claims(evidence: Evidence) -> list[Answer]:
    """All fourteen, in their order."""
    pairs, elsewhere = pairs_of(evidence), pairs_elsewhere(evidence)
    return [
        table_claims.parameters(pairs),
        table_claims.time(pairs, elsewhere),
        table_claims.perplexity(pairs),
        table_claims.same_size(pairs),
        optimizer_claims.fewer_steps(evidence),
        optimizer_claims.stable(evidence),
        part_claims.alone(evidence, "C7", "grove"),
        part_claims.alone(evidence, "C8", "arnold"),
        table_claims.memory(pairs, elsewhere),
        *_scaling(evidence),
        part_claims.synthetic(evidence),
        table_claims.greener(pairs),
    ]


def _scaling(evidence: Evidence) -> list[Answer]:
    wanted = {
        "C10": "steeper in parameters",
        "C11": "the same exponent of data",
        "C12": "the rank governs the loss",
    }
    of_all, of_ranks = ({} if laws is None else scaling_claims(laws) for laws in (evidence.laws, evidence.rank_laws))
    answers = []
    for name, says in wanted.items():
        found = of_ranks if name == "C12" else of_all
        claims = [(subject, claim) for subject, all_of in found.items() for claim in all_of if claim.name == name]
        if name != "C12":
            claims = [(subject, claim) for subject, claim in claims if subject.startswith("kalmagrove")]
        verdict: Verdict = "not measured"
        if claims:
            verdicts: set[Verdict] = {claim.verdict for _, claim in claims}
            verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
        ours = "; ".join(f"{subject}: {claim.verdict}, {claim.reason}" for subject, claim in claims)
        reason = "every law and every baseline must agree, with 95 % intervals by bootstrap over runs and seeds"
        answers.append(Answer(name, says, "alpha larger, beta about equal" if name != "C12" else "f(r)", ours or "-",
                              verdict, reason))  # fmt: skip
    return answers
