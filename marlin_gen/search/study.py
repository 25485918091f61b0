"""Optuna, in its two roles: a sampler per problem that proposes, and a journal on disk that people watch.

The samplers' studies live in memory and are rebuilt from the measurement log. The journal holds one trial per
candidate (`optuna-dashboard <file>` shows it); nothing is ever read back from it that the log does not have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState, create_trial

from marlin_gen.config import KernelConfig
from marlin_gen.problem import Problem
from marlin_gen.record import cut_torn_tail
from marlin_gen.space import FIELDS, NUMBERS, Candidates
from marlin_gen.whole_files import naming

STUDY_NAME = "marlin_gen"
STARTUP_TRIALS = 8  # before that a sampler draws at random


class Samplers:
    """One in-memory study with a multivariate TPE sampler per problem; all learn from every measurement."""

    def __init__(self, candidates: Candidates, problems: Sequence[Problem], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._choices = {name: values for name, values in candidates.choices.items() if len(values) > 1}
        # Numbers by position, so that the sampler knows their order and that 48 is next to 32 and 64.
        self._space: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if name in NUMBERS else CategoricalDistribution(values)
            for name, values in self._choices.items()
        }
        self._fixed = {name: candidates.choices[name][0] for name in FIELDS if name not in self._choices}
        self._seed = seed
        self._studies = {p: optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)) for p in problems}
        self._positions = list(self._studies)

    def add(self, problem: Problem, config: KernelConfig, us: float | None) -> None:
        """Tell a problem's sampler the time of a config; None: it failed."""
        params = {
            name: values.index(getattr(config, name)) if name in NUMBERS else getattr(config, name)
            for name, values in self._choices.items()
        }
        trial = create_trial(
            params=params,
            distributions=self._space,
            value=None if us is None else float(np.log(us)),
            state=TrialState.PRUNED if us is None else TrialState.COMPLETE,
        )
        self._studies[problem].add_trial(trial)

    def ask(self, problem: Problem, turn: int) -> dict[str, Any]:
        """Field values that the problem's sampler would try next; not necessarily a legal config.

        Depends on the seed, ``turn`` and what was added, not on what was asked before: a resumed search asks the same.
        """
        study = self._studies[problem]
        state = np.random.SeedSequence((self._seed, turn, self._positions.index(problem)))
        with catch_warnings():
            simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                multivariate=True, n_startup_trials=STARTUP_TRIALS, seed=int(state.generate_state(1)[0])
            )
        trial = study.ask(self._space)
        values = {
            name: self._choices[name][value] if name in NUMBERS else value for name, value in trial.params.items()
        }
        # The snapped config is what gets measured and added; the point itself is closed.
        study.tell(trial, state=TrialState.FAIL)
        return {**self._fixed, **values}


class Journal:
    """The persistent study: one trial per candidate, RUNNING from its proposal until it is done with."""

    def __init__(self, path: Path, candidates: Candidates) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _repair(path)
        storage = optuna.storages.JournalStorage(
            JournalFileBackend(str(path), lock_obj=JournalFileSymlinkLock(str(path), grace_period=5))
        )
        # Optuna fixes a study's choices for good; another space is another study in the same file.
        digest = hashlib.sha256(repr(sorted(candidates.choices.items())).encode()).hexdigest()[:8]
        self._study = optuna.create_study(
            study_name=f"{STUDY_NAME}-{digest}", storage=storage, direction="maximize", load_if_exists=True
        )
        self._space: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in candidates.choices.items()
        }
        self._trials: dict[str, tuple[int, int]] = {}  # config key -> trial number and id
        self._finished: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL:
                continue
            key = trial.user_attrs.get("config", "")
            self._trials[key] = (trial.number, trial._trial_id)
            if trial.state.is_finished():
                self._finished.add(key)

    def start(self, configs: Iterable[KernelConfig]) -> None:
        """Show these as running. Those already there are left alone."""
        for config in configs:
            if config.key in self._trials:
                continue
            trial = create_trial(
                state=TrialState.RUNNING,
                params={name: getattr(config, name) for name in FIELDS},
                distributions=self._space,
                user_attrs={"config": config.key},
            )
            with naming(self.path):
                self._study.add_trial(trial)
            added = self._study.get_trials(deepcopy=False)[-1]
            self._trials[config.key] = (added.number, added._trial_id)

    def finish(self, config: KernelConfig, value: float | None, attributes: Mapping[str, Any]) -> None:
        """``value``: the best roofline fraction over the problems; None: the candidate failed (told as PRUNED)."""
        if config.key in self._finished:
            return
        self.start([config])
        number, trial_id = self._trials[config.key]
        trial = optuna.trial.Trial(self._study, trial_id)
        with naming(self.path):
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            self._study.tell(number, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
        self._finished.add(config.key)

    def reap(self, pending: Iterable[KernelConfig]) -> int:
        """Tell running trials that nobody will take up again as failed: their log is gone. Returns how many."""
        keep = {config.key for config in pending}
        lost = [key for key in self._trials if key not in self._finished and key not in keep]
        for key in lost:
            self._study.tell(self._trials[key][0], state=TrialState.FAIL)
            del self._trials[key]
        return len(lost)


def _repair(path: Path) -> None:
    """Undo what a kill leaves: a half-written last line, and a lock that nobody holds.

    Safe because the measurement log beside it is locked by this process: no other tune writes here.
    """
    if path.exists():
        with open(path, "r+b", buffering=0) as file:
            cut_torn_tail(file)
    for leftover in path.parent.glob(f"{path.name}.lock*"):
        os.unlink(leftover)
