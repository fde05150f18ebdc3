//! A whole model with random weights on a backend: what was planned beside what was taken, and what it answers.

use std::{sync::Arc, time::Instant};

use cadre_checkpoint::Checkpoint;
use cadre_model::{
    ExpertLoader, LoadOptions, MemoryPlan, Model, SegmentKind, WorkerSizes, Workspace, element_type,
    plan::expert_elements, shard_plan, worker_plan,
};
use cadre_ops::Backend;
use cadre_types::TokenId;

use crate::support::{InPlaceExperts, Pocket, argmax, table};

/// What came of it.
pub(crate) struct Measured {
    /// Attention, cache and workspace.
    pub(crate) worker: MemoryPlan,
    /// Every expert of every layer.
    pub(crate) experts: MemoryPlan,
    /// Bytes taken by all of it, one step included.
    pub(crate) taken: u64,
    /// Seconds of each phase: attention weights, experts, prompt, then each decode step.
    pub(crate) seconds: Vec<f64>,
    /// Greedy tokens after a prompt.
    pub(crate) tokens: Vec<TokenId>,
}

impl Measured {
    /// Taken over planned.
    pub(crate) fn ratio(&self) -> f64 {
        self.taken as f64 / (self.worker.total() + self.experts.weights) as f64
    }
}

/// Loads everything, answers a prompt of `rows` tokens greedily. `used` tells bytes in use.
pub(crate) fn measure<B: Backend>(
    backend: Arc<B>,
    checkpoint: &Arc<Checkpoint>,
    sizes: WorkerSizes,
    answer: usize,
    used: &dyn Fn(&B) -> u64,
) -> Measured {
    let config = checkpoint.config().clone();
    let elements = |name: &str| element_type(checkpoint, name);
    let worker = worker_plan(&*backend, &config, &elements, sizes).unwrap();
    let count = config.moe_layers().count() * config.n_routed_experts;
    let experts = shard_plan(&*backend, &config, expert_elements(&config), count).unwrap();

    let before = used(&backend);
    let mut seconds = Vec::new();
    let mut began = Instant::now();
    let mut lap = || {
        seconds.push(began.elapsed().as_secs_f64());
        began = Instant::now();
    };
    let options = LoadOptions { mtp: sizes.mtp };
    let model = Model::load(backend.clone(), checkpoint, &options, &mut |_| {}).unwrap();
    lap();
    let loaded = InPlaceExperts::load(&ExpertLoader::new(backend.clone(), checkpoint.clone()));
    lap();
    let ws = Workspace::new(&model, sizes.rows, sizes.rows).unwrap();
    let cache = model.new_cache(sizes.pages).unwrap();
    let mut pocket = Pocket { model, experts: loaded, ws, cache };

    let vocab = config.vocab_size;
    let prompt: Vec<TokenId> = (0..sizes.rows.min(32) as u32).map(|i| (i * 37 + 5) % vocab as u32).collect();
    let pages = table(prompt.len() + answer);
    let out = pocket.step(SegmentKind::Prefill, &prompt, 0, &pages, &mut ());
    let last = |logits: &[f32]| argmax(&logits[logits.len() - vocab..]) as TokenId;
    lap();
    assert!(out.logits.iter().all(|logit| logit.is_finite()));
    let mut tokens = vec![last(&out.logits)];
    for at in prompt.len()..prompt.len() + answer - 1 {
        let next = [tokens[tokens.len() - 1]];
        let out = pocket.step(SegmentKind::Decode, &next, at, &pages, &mut ());
        lap();
        tokens.push(last(&out.logits));
    }
    let taken = used(&backend).saturating_sub(before);
    Measured { worker, experts, taken, seconds, tokens }
}
