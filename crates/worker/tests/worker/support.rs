//! Engines over the bundled checkpoint, expert shards behind gRPC, and workers served on loopback.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cadre_checkpoint::Checkpoint;
use cadre_dispatch::{ExpertServer, tuning};
use cadre_engine::{
    EngineEvent, EngineHandle, GeneratedToken, PrefillPlace, SequenceRequest, SequenceStream,
};
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_placement::{ExpertLoad, affordable_copies, plan_initial};
use cadre_proto::v1::worker_client::WorkerClient;
use cadre_shard::{CheckpointSource, Shard, ShardOptions};
use cadre_types::{
    ClusterView, FinishReason, Generation, Layout, Member, MemberId, MemberState, NumericsClass, Placement,
    PlacementEpoch, Role, SamplingParams, ShardIndex, StopConditions, TokenId,
};
use cadre_worker::{
    inprocess::{InProcess, InProcessOptions},
    service::{ServiceOptions, WorkerService},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::Channel;

pub(crate) fn pocket() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/pocket")
}

pub(crate) fn golden() -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// One thread, few pages: many engines share the machine.
pub(crate) fn small(class: NumericsClass) -> InProcessOptions {
    InProcessOptions { threads: Some(1), kv_pages: 160, ..InProcessOptions::new(class) }
}

pub(crate) fn open(options: &InProcessOptions) -> InProcess {
    InProcess::open(&pocket(), options).unwrap()
}

/// A prompt that depends on `seed`.
pub(crate) fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens).map(|at| (seed.wrapping_mul(2_654_435_761) ^ (at * 40_503)) % 4000 + 5).collect()
}

/// A request that samples with penalties and logprobs.
pub(crate) fn request(name: &str, prompt: Vec<TokenId>, max_tokens: u32) -> SequenceRequest {
    SequenceRequest {
        request_id: name.to_owned(),
        prompt,
        sampling: SamplingParams {
            temperature: 0.9,
            top_p: 0.95,
            repetition_penalty: 1.1,
            seed: 3,
            logprobs: Some(4),
            ..SamplingParams::default()
        },
        stop: StopConditions { max_tokens, ignore_eos: true, ..StopConditions::default() },
        prefill: PrefillPlace::Local,
        deadline: None,
    }
}

/// The tokens of a sequence that must finish by its length.
pub(crate) async fn tokens(mut events: SequenceStream) -> Vec<GeneratedToken> {
    let mut tokens = Vec::new();
    loop {
        match events.recv().await {
            Some(EngineEvent::Token(token)) => tokens.push(token),
            Some(EngineEvent::Finished(FinishReason::Length | FinishReason::Stop)) => return tokens,
            Some(EngineEvent::Finished(reason)) => panic!("{reason:?}"),
            Some(EngineEvent::Failed(error)) => panic!("{error}"),
            Some(EngineEvent::Reserved | EngineEvent::Computed(_)) => {}
            None => panic!("the stream ends without an end"),
        }
    }
}

pub(crate) async fn generate(engine: &EngineHandle, request: SequenceRequest) -> Vec<GeneratedToken> {
    tokens(engine.submit(request).unwrap()).await
}

/// Waits until no sequence is left and every page is free.
pub(crate) async fn wait_empty(engine: &EngineHandle) {
    loop {
        let load = engine.stats().load();
        if load.running + load.waiting == 0 {
            assert_eq!(load.pages_free, load.pages_total, "pages leak");
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// A worker's service on loopback. The server ends with this.
pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    pub(crate) service: WorkerService,
    server: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Served {
    pub(crate) async fn start(role: Role, generation: Generation, handoff_timeout: Duration) -> Self {
        let service = WorkerService::new(ServiceOptions { generation, role, handoff_timeout, secret: None });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tuning::server().add_service(service.clone().into_server());
        let server = tokio::spawn(async move {
            serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
        });
        Self { address, service, server }
    }

    pub(crate) fn client(&self) -> WorkerClient<Channel> {
        WorkerClient::new(tuning::endpoint(&self.address.to_string()).unwrap().connect_lazy())
    }

    /// Stops answering, as a process that died.
    pub(crate) fn kill(&self) {
        self.server.abort();
    }
}

/// Expert shards of the bundled checkpoint behind gRPC servers, with their view.
pub(crate) struct Experts {
    pub(crate) view: Arc<ClusterView>,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for Experts {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

impl Experts {
    pub(crate) async fn start(class: NumericsClass, shards: usize, redundant_slots: usize) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(pocket()).unwrap());
        let cpu = CpuOptions { threads: Some(1), ..CpuOptions::new(class) };
        let backend = Arc::new(CpuBackend::new(cpu).unwrap());
        let config = checkpoint.config();
        let load = ExpertLoad::uniform(config.served_moe_layers(), config.n_routed_experts).unwrap();
        let layout = Layout {
            shards: shards as u16,
            redundant_slots: redundant_slots as u32,
            min_copies: affordable_copies(config.n_routed_experts, redundant_slots) as u16,
        };
        let placement: Arc<Placement> =
            Arc::new(plan_initial(&load, config.n_routed_experts, layout, &[], PlacementEpoch(1)).unwrap());
        let generation =
            Generation { model: checkpoint.model_hash(), numerics: class, epoch: placement.epoch() };
        let (mut members, mut servers) = (Vec::new(), Vec::new());
        for shard in (0..shards as u16).map(ShardIndex) {
            let options = ShardOptions { shard, weights: generation, hidden: config.hidden_size };
            let source = CheckpointSource::new(Arc::clone(&backend), Arc::clone(&checkpoint));
            let served = Shard::spawn(options, Arc::clone(&backend), Arc::new(source), None).unwrap();
            served.apply(&placement).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            members.push(Member {
                id: MemberId(format!("shard-{}", shard.0)),
                role: Role::Expert(shard),
                address: listener.local_addr().unwrap().to_string(),
                state: MemberState::Ready,
                pod: None,
            });
            let serving = tuning::server().add_service(ExpertServer::new(Arc::new(served)).into_service());
            servers.push(tokio::spawn(async move {
                serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
            }));
        }
        Self { view: Arc::new(ClusterView::settled(generation, placement, members)), servers }
    }

    /// Ends a shard's server and its connections.
    pub(crate) fn kill(&self, shard: usize) {
        self.servers[shard].abort();
    }
}
