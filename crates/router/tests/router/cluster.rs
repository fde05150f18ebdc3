//! A router on ephemeral ports with members that report to it.

use std::{
    num::NonZeroU16,
    path::PathBuf,
    sync::{Arc, LazyLock},
    time::Duration,
};

use cadre_checkpoint::Checkpoint;
use cadre_proto::v1::{self, coordinator_client::CoordinatorClient, inference_client::InferenceClient};
use cadre_router::{BoundAddresses, ListenAddresses, RouterError, RouterOptions};
use cadre_text::Tokenizer;
use cadre_types::{Generation, ModelHash, NumericsClass, PlacementEpoch};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::fake_worker::FakeWorker;

pub const MODEL: &str = "pocket";

pub fn model_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket"))
}

pub static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(&model_dir()).unwrap());

static HASH: LazyLock<ModelHash> = LazyLock::new(|| Checkpoint::open(model_dir()).unwrap().model_hash());

/// The tokens of a text, without BOS.
pub fn tokens(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, false).unwrap()
}

/// A running router.
pub struct Cluster {
    pub at: BoundAddresses,
    stop: Option<oneshot::Sender<()>>,
    router: JoinHandle<Result<(), RouterError>>,
    members: Vec<TestMember>,
}

/// A member's registration; dropping it closes its stream.
pub struct TestMember {
    pub reports: mpsc::Sender<v1::Report>,
    pub first: v1::Report,
    _renew: JoinHandle<()>,
}

impl Drop for TestMember {
    fn drop(&mut self) {
        self._renew.abort();
    }
}

/// Options over the pocket model with one shard and free ports.
pub fn options() -> RouterOptions {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut options = RouterOptions::new(model_dir(), NonZeroU16::new(1).unwrap());
    options.listen = ListenAddresses { grpc: any, http: any, coordinator: any, admin: any };
    options
}

/// Options whose waits for workers end soon.
pub fn impatient() -> RouterOptions {
    let mut options = options();
    options.limits.reserve_timeout = Duration::from_millis(600);
    options
}

pub fn generation() -> Generation {
    Generation { model: *HASH, numerics: NumericsClass::default(), epoch: PlacementEpoch(0) }
}

pub fn report(id: &str, role: v1::Role, address: String) -> v1::Report {
    v1::Report {
        member: Some(v1::Member {
            id: id.into(),
            role: role.into(),
            shard: 0,
            address,
            state: v1::MemberState::Ready.into(),
            pod: None,
        }),
        generation: Some(generation().into()),
        worker: Some(v1::WorkerLoad {
            running_sequences: 0,
            waiting_sequences: 0,
            free_pages: 1024,
            total_pages: 1024,
        }),
        ..v1::Report::default()
    }
}

impl Cluster {
    /// A router and its one shard, without workers.
    pub async fn bare(mut options: RouterOptions) -> Self {
        let (bound, at) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        options.bound = Some(bound);
        let router = tokio::spawn(cadre_router::run(options, async move {
            // Dropping the cluster stops the router, too.
            let _ = stopped.await;
        }));
        let at = at.await.unwrap();
        let mut cluster = Self { at, stop: Some(stop), router, members: Vec::new() };
        let shard = report("shard-0", v1::Role::Expert, "127.0.0.1:1".into());
        cluster.add(shard).await;
        cluster
    }

    /// A router, its shard and one worker of role both; ready.
    pub async fn with_worker(options: RouterOptions, worker: &FakeWorker) -> Self {
        let mut cluster = Self::bare(options).await;
        cluster.add_worker("w-1", v1::Role::Both, worker).await;
        cluster.ready(true).await;
        cluster
    }

    pub async fn add_worker(&mut self, id: &str, role: v1::Role, worker: &FakeWorker) {
        self.add(report(id, role, worker.address.to_string())).await;
    }

    /// Registers a member that keeps reporting, and waits until the coordinator has it.
    pub async fn add(&mut self, first: v1::Report) {
        let (member, mut views) = self.join(first).await.unwrap();
        let id = member.first.member.clone().unwrap().id;
        // The first view after joining has the member.
        let view = views.message().await.unwrap().unwrap();
        assert!(view.members.iter().any(|known| known.id == id), "{view:?}");
        tokio::spawn(async move { while let Ok(Some(_)) = views.message().await {} });
        self.members.push(member);
    }

    /// Opens a Watch stream with a first report.
    pub async fn join(&self, first: v1::Report) -> Result<(TestMember, Streaming<v1::ClusterView>), Status> {
        let mut client = CoordinatorClient::connect(format!("http://{}", self.at.coordinator)).await.unwrap();
        let (reports, stream) = mpsc::channel(8);
        reports.send(first.clone()).await.unwrap();
        let views = client.watch(ReceiverStream::new(stream)).await?.into_inner();
        let renew = tokio::spawn({
            let (reports, report) = (reports.clone(), first.clone());
            async move {
                let mut beat = tokio::time::interval(Duration::from_millis(500));
                while beat.tick().await.elapsed() < Duration::MAX {
                    if reports.send(report.clone()).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok((TestMember { reports, first, _renew: renew }, views))
    }

    /// Closes a member's stream.
    pub fn remove(&mut self, id: &str) {
        self.members.retain(|member| member.first.member.as_ref().is_none_or(|known| known.id != id));
    }

    /// Waits until health says that the router is ready, or not.
    pub async fn ready(&self, ready: bool) {
        let wanted = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        let mut health = HealthClient::new(self.channel().await);
        let request = HealthCheckRequest { service: "cadre.v1.Inference".into() };
        let mut statuses = health.watch(request).await.unwrap().into_inner();
        while let Some(status) = statuses.message().await.unwrap() {
            if status.status() == wanted {
                return;
            }
        }
        panic!("health ended before {wanted:?}");
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.at.grpc)).unwrap().connect().await.unwrap()
    }

    pub async fn grpc(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel().await)
    }

    /// Asks the router to stop; it drains.
    pub fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits for the router's end.
    pub async fn ended(self) -> Result<(), RouterError> {
        self.router.await.unwrap()
    }

    /// A metric's value, by the beginning of its line.
    pub async fn metric(&self, line: &str) -> f64 {
        let (_, text) = crate::http_client::get(self.at.admin, "/metrics").await;
        let value = text
            .lines()
            .find_map(|found| found.strip_prefix(line))
            .unwrap_or_else(|| panic!("{line} in\n{text}"));
        value.trim().parse().unwrap()
    }
}

/// A request of text over gRPC.
pub fn text_request(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Text(text.into())),
        ..v1::GenerateRequest::default()
    }
}

/// Shared by tests that hold streams back.
pub fn gate() -> Arc<tokio::sync::Semaphore> {
    Arc::new(tokio::sync::Semaphore::new(0))
}
