//! Random histories of a scheduler against a model that only counts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use cadre_scheduler::{
    CommitKind, NewSequence, PAGE_TOKENS, Scheduler, SchedulerConfig, SchedulerError, SequenceKind,
    SequenceState, StepPlan, pages_for,
};
use cadre_types::{PageId, SequenceId, TokenId};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Call {
    Submit {
        prompt: usize,
        max_tokens: u32,
        kind: SequenceKind,
        deadline: Option<u64>,
    },
    /// Plan, compute, commit.
    Step,
    /// Plan, then fail before any commit.
    FailedStep,
    /// Plan, cancel one of the sequences, commit the rest.
    CancelInStep(usize),
    Cancel(usize),
    Handoff(usize),
    Finish(usize),
    Expire(u64),
}

fn call() -> impl Strategy<Value = Call> {
    let kind = prop_oneof![
        3 => Just(SequenceKind::Local),
        1 => Just(SequenceKind::PrefillOnly),
        1 => Just(SequenceKind::AwaitHandoff),
    ];
    let deadline = prop_oneof![3 => Just(None), 1 => (0u64..100).prop_map(Some)];
    prop_oneof![
        5 => (0usize..400, 0u32..150, kind, deadline).prop_map(
            |(prompt, max_tokens, kind, deadline)| Call::Submit { prompt, max_tokens, kind, deadline }
        ),
        10 => Just(Call::Step),
        1 => Just(Call::FailedStep),
        1 => any::<usize>().prop_map(Call::CancelInStep),
        1 => any::<usize>().prop_map(Call::Cancel),
        2 => any::<usize>().prop_map(Call::Handoff),
        2 => any::<usize>().prop_map(Call::Finish),
        1 => (0u64..100).prop_map(Call::Expire),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (1u32..24, 1usize..6, 1usize..6, 1usize..80, 1usize..100, 1usize..60).prop_map(
        |(pages, max_waiting, max_decode_rows, spare, max_chunk_tokens, with_decode)| SchedulerConfig {
            pages,
            max_waiting,
            max_decode_rows,
            max_step_tokens: max_decode_rows + spare,
            max_chunk_tokens,
            prefill_tokens_with_decode: with_decode,
        },
    )
}

/// What a sequence must look like, counted from outside.
#[derive(Debug)]
struct Expected {
    prompt: usize,
    max_tokens: usize,
    kind: SequenceKind,
    deadline: Option<u64>,
    admitted: bool,
    computed: usize,
    output: Vec<TokenId>,
}

#[derive(Debug)]
struct Model {
    scheduler: Scheduler,
    live: BTreeMap<SequenceId, Expected>,
    last_admitted: Option<SequenceId>,
    next_token: TokenId,
    plans: Vec<StepPlan>,
    finished: usize,
}

impl Model {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            live: BTreeMap::new(),
            last_admitted: None,
            next_token: 0,
            plans: Vec::new(),
            finished: 0,
        }
    }

    fn apply(&mut self, call: &Call) {
        match *call {
            Call::Submit { prompt, max_tokens, kind, deadline } => {
                self.submit(prompt, max_tokens, kind, deadline);
            }
            Call::Step => self.step(None),
            Call::FailedStep => drop(self.plan()),
            Call::CancelInStep(nth) => self.step(self.nth(nth, |_| true)),
            Call::Cancel(nth) => self.cancel(self.nth(nth, |_| true)),
            Call::Handoff(nth) => {
                let awaiting = self.nth(nth, |expected| {
                    expected.admitted
                        && expected.kind == SequenceKind::AwaitHandoff
                        && expected.output.is_empty()
                });
                self.handoff(awaiting);
            }
            Call::Finish(nth) => self.finish(self.nth(nth, |expected| !expected.output.is_empty())),
            Call::Expire(now) => {
                let late: Vec<SequenceId> = self
                    .live
                    .iter()
                    .filter(|(_, expected)| expected.deadline.is_some_and(|at| at <= now))
                    .map(|(&id, _)| id)
                    .collect();
                assert_eq!(self.scheduler.expired(now), late);
                late.into_iter().for_each(|id| self.cancel(Some(id)));
            }
        }
        self.check();
    }

    fn nth(&self, nth: usize, wanted: impl Fn(&Expected) -> bool) -> Option<SequenceId> {
        let ids: Vec<SequenceId> =
            self.live.iter().filter(|(_, expected)| wanted(expected)).map(|(&id, _)| id).collect();
        (!ids.is_empty()).then(|| ids[nth % ids.len()])
    }

    fn submit(&mut self, prompt: usize, max_tokens: u32, kind: SequenceKind, deadline: Option<u64>) {
        let config = self.scheduler.config().clone();
        let waiting = self.live.values().filter(|expected| !expected.admitted).count();
        let reserve = match kind {
            SequenceKind::PrefillOnly => prompt,
            _ => prompt + max_tokens as usize,
        };
        let answer = self.scheduler.submit(NewSequence {
            prompt: (0..prompt as u32).collect(),
            max_tokens,
            kind,
            deadline,
        });
        match answer {
            Ok(id) => {
                assert!(prompt > 0 && max_tokens > 0 && waiting < config.max_waiting);
                assert!(pages_for(reserve) <= config.pages as usize);
                assert!(self.live.keys().all(|&older| older < id));
                self.live.insert(
                    id,
                    Expected {
                        prompt,
                        max_tokens: max_tokens as usize,
                        kind,
                        deadline,
                        admitted: false,
                        computed: 0,
                        output: Vec::new(),
                    },
                );
            }
            Err(SchedulerError::EmptyPrompt) => assert_eq!(prompt, 0),
            Err(SchedulerError::NoOutput) => assert_eq!(max_tokens, 0),
            Err(SchedulerError::NeverFits { tokens, pages, total }) => {
                assert_eq!((tokens, total), (reserve, config.pages as usize));
                assert!(pages > total && (pages - 1) * PAGE_TOKENS < tokens);
            }
            Err(SchedulerError::QueueFull { waiting: found, bound }) => {
                assert_eq!((found, bound), (waiting, config.max_waiting));
                assert_eq!(found, bound);
            }
            Err(other) => panic!("submit: {other}"),
        }
    }

    /// Plans and checks the plan against the rules.
    fn plan(&mut self) -> StepPlan {
        let config = self.scheduler.config().clone();
        let free_before = self.scheduler.stats().pages_free;
        let plan = self.scheduler.plan();

        // FIFO: admissions ascend for ever, and stop exactly where the head does not fit.
        for &id in &plan.admitted {
            assert!(self.last_admitted < Some(id), "{id} was admitted after a younger one");
            self.last_admitted = Some(id);
            self.live.get_mut(&id).unwrap().admitted = true;
        }
        let head = self.live.iter().find(|(_, expected)| !expected.admitted);
        assert_eq!(head.is_some(), plan.blocked.is_some());
        assert!(head.is_none_or(|(&id, _)| Some(id) > self.last_admitted));
        if let Some(blocked) = plan.blocked {
            assert!(blocked.requested > blocked.free && blocked.free <= free_before);
        }

        // Budgets.
        let prompt_tokens: usize = plan.prefill.iter().map(|chunk| chunk.len).sum();
        assert!(plan.decode.len() <= config.max_decode_rows);
        assert!(plan.rows() <= config.max_step_tokens);
        if !plan.decode.is_empty() {
            assert!(prompt_tokens <= config.prefill_tokens_with_decode);
        }

        // Rows follow on from what was committed, and stay inside their pages.
        let mut seen = BTreeSet::new();
        for row in &plan.decode {
            let expected = &self.live[&row.id];
            assert!(seen.insert(row.id));
            assert!(expected.output.len() < expected.max_tokens);
            assert_eq!(Some(&row.token), expected.output.last());
            assert_eq!(row.position as usize, expected.prompt + expected.output.len() - 1);
            let pages = self.scheduler.sequence(row.id).unwrap().block_table().len();
            assert!((row.position as usize) < pages * PAGE_TOKENS);
        }
        for chunk in &plan.prefill {
            let expected = &self.live[&chunk.id];
            assert!(seen.insert(chunk.id));
            assert!((1..=config.max_chunk_tokens).contains(&chunk.len));
            assert_eq!(chunk.first_position as usize, expected.computed);
            assert_eq!(chunk.last, expected.computed + chunk.len == expected.prompt);
        }

        // Work-conserving: everyone who could have a row has one, or the budget is spent.
        let decodable = self
            .live
            .values()
            .filter(|expected| {
                expected.kind != SequenceKind::PrefillOnly
                    && !expected.output.is_empty()
                    && expected.output.len() < expected.max_tokens
            })
            .count();
        assert_eq!(plan.decode.len(), decodable.min(config.max_decode_rows));
        let prefilling = self
            .live
            .values()
            .filter(|expected| {
                expected.admitted
                    && expected.kind != SequenceKind::AwaitHandoff
                    && expected.computed < expected.prompt
            })
            .count();
        assert_eq!(plan.prefill.is_empty(), prefilling == 0, "prompts always advance");
        self.plans.push(plan.clone());
        plan
    }

    fn step(&mut self, cancelled: Option<SequenceId>) {
        let plan = self.plan();
        self.cancel(cancelled);
        for id in plan.decode.iter().map(|row| row.id) {
            self.sampled(id);
        }
        for chunk in &plan.prefill {
            if let Some(expected) = self.live.get_mut(&chunk.id) {
                expected.computed += chunk.len;
            }
            if chunk.last {
                self.sampled(chunk.id);
            } else {
                let answer = self.scheduler.commit(chunk.id, CommitKind::Prefilled);
                assert_eq!(answer.is_ok(), self.live.contains_key(&chunk.id));
            }
        }
    }

    fn sampled(&mut self, id: SequenceId) {
        self.next_token += 1;
        let answer = self.scheduler.commit(id, CommitKind::Sampled(self.next_token));
        match self.live.get_mut(&id) {
            Some(expected) => {
                answer.unwrap();
                expected.output.push(self.next_token);
            }
            None => assert_eq!(answer, Err(SchedulerError::Unknown { operation: "commit", id })),
        }
    }

    fn handoff(&mut self, id: Option<SequenceId>) {
        let Some(id) = id else { return };
        self.next_token += 1;
        self.scheduler.handoff_complete(id, self.next_token).unwrap();
        let expected = self.live.get_mut(&id).unwrap();
        expected.computed = expected.prompt;
        expected.output.push(self.next_token);
    }

    fn finish(&mut self, id: Option<SequenceId>) {
        let Some(id) = id else { return };
        let expected = self.live.remove(&id).unwrap();
        assert_eq!(self.scheduler.sequence(id).unwrap().output(), expected.output);
        assert!(self.scheduler.end(id));
        self.finished += 1;
    }

    fn cancel(&mut self, id: Option<SequenceId>) {
        let Some(id) = id else { return };
        assert_eq!(self.scheduler.end(id), self.live.remove(&id).is_some());
        assert!(!self.scheduler.end(id), "twice");
    }

    /// Pages are conserved and the counts agree, whatever has happened.
    fn check(&self) {
        let stats = self.scheduler.stats();
        let mut pages: Vec<PageId> = Vec::new();
        for (&id, expected) in &self.live {
            let sequence = self.scheduler.sequence(id).unwrap();
            let reserved = match (expected.admitted, expected.kind) {
                (false, _) => 0,
                (true, SequenceKind::PrefillOnly) => pages_for(expected.prompt),
                (true, _) => pages_for(expected.prompt + expected.max_tokens),
            };
            assert_eq!(sequence.block_table().len(), reserved);
            assert_eq!(sequence.output(), expected.output);
            assert_eq!(sequence.prompt().len(), expected.prompt);
            // KV length: the prompt so far, or known tokens - 1.
            let known = expected.prompt + expected.output.len();
            let kv = if expected.output.is_empty() { expected.computed } else { known - 1 };
            assert_eq!(sequence.next_position() as usize, kv);
            assert_eq!(sequence.state() == SequenceState::Waiting, !expected.admitted);
            pages.extend(sequence.block_table());
        }
        let distinct: BTreeSet<PageId> = pages.iter().copied().collect();
        assert_eq!(distinct.len(), pages.len(), "a page has two owners");
        assert!(distinct.iter().all(|page| page.index() < stats.pages_total));
        assert_eq!(stats.pages_used, pages.len());
        assert_eq!(stats.pages_free + stats.pages_used, stats.pages_total);
        assert_eq!(stats.pages_total, self.scheduler.config().pages as usize);
        let counted = stats.waiting + stats.prefilling + stats.awaiting_kv + stats.decoding + stats.held;
        assert_eq!(counted, self.live.len());
        assert!(stats.waiting <= self.scheduler.config().max_waiting);
    }

    /// Serves what is left the way an engine does; everything must end, in bounded steps.
    fn drain(&mut self) {
        let config = self.scheduler.config();
        let tokens: usize = self.live.values().map(|expected| expected.prompt + expected.max_tokens).sum();
        // Every step moves at least one row, or follows a hand-off or a finish.
        let bound = tokens + 2 * self.live.len() + config.pages as usize;
        let to_finish = self.finished + self.live.len();
        for _ in 0..=bound {
            if self.live.is_empty() {
                break;
            }
            self.apply(&Call::Step);
            while let Some(id) = self.nth(0, |expected| {
                expected.admitted && expected.kind == SequenceKind::AwaitHandoff && expected.output.is_empty()
            }) {
                self.handoff(Some(id));
            }
            while let Some(id) = self.nth(0, |expected| {
                expected.output.len() == expected.max_tokens
                    || (expected.kind == SequenceKind::PrefillOnly && !expected.output.is_empty())
            }) {
                self.finish(Some(id));
            }
            self.check();
        }
        assert_eq!(self.finished, to_finish, "left after {bound} steps: {:?}", self.live);
        assert_eq!(self.scheduler.stats().pages_used, 0, "pages leaked");
    }
}

/// Without a file of past failures: the smallest failing input is printed, and belongs in a test of its own.
fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn every_history_keeps_the_rules_and_ends(
        config in config(),
        calls in prop::collection::vec(call(), 0..120),
    ) {
        let mut model = Model::new(config);
        for call in &calls {
            model.apply(call);
        }
        model.drain();
    }

    #[test]
    fn plans_depend_on_the_calls_alone(
        config in config(),
        calls in prop::collection::vec(call(), 0..60),
    ) {
        let (mut once, mut twice) = (Model::new(config.clone()), Model::new(config));
        for call in &calls {
            once.apply(call);
            twice.apply(call);
        }
        prop_assert_eq!(once.plans, twice.plans);
    }
}
