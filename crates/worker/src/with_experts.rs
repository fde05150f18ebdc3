//! A worker and expert shards of its device in one process.
//!
//! Two processes on one card take turns that cost more than a decode layer (docs/adr/0017); here they share the
//! device's context. For everybody else they stay what they are: each registers as a member of its own, with a port
//! of its own, and is planned, covered and drained as one. The worker reaches the shards of its process without a
//! socket, all others as ever.
//!
//! **Ends.** Asked to stop, the worker drains first and the shards after it. A worker that fails ends the process. So
//! does a shard that has never been ready: it has a reason that another try does not cure. One that was ready is
//! started again in place, as a process would be, while the worker goes on with other copies.

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use cadre_device::{BackendOptions, OpenDevice};
use cadre_expert::{ExpertOptions, SharedProcess, part_name};
use cadre_telemetry::{admin, axum};
use cadre_types::ShardIndex;
use futures::future::{join_all, try_join_all};
use serde::Serialize;
use tokio::sync::{oneshot, watch};

use crate::{options::WorkerOptions, run::on_thread};

/// First pause before a shard is started again; doubles with every quick death.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A shard that lived this long starts with the first pause again.
const HEALTHY: Duration = Duration::from_secs(30);

/// Where the roles of a process listen indeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SharedAddresses {
    /// The worker's gRPC.
    pub grpc: SocketAddr,
    /// Admin of the process.
    pub admin: SocketAddr,
    /// The shards' gRPC, in the order given.
    pub experts: Vec<ShardAddress>,
}

/// Where a shard listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShardAddress {
    /// Which.
    pub shard: ShardIndex,
    /// gRPC.
    pub grpc: SocketAddr,
}

/// Runs a worker and shards on the worker's device until `shutdown` resolves (then drains) or something that they
/// cannot live without is gone. Device, threads and admin address are the worker's; `bound` is told where all of them
/// listen.
pub async fn run_with_experts(
    mut worker: WorkerOptions,
    experts: Vec<ExpertOptions>,
    bound: oneshot::Sender<SharedAddresses>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let listener = cadre_net::bind(worker.admin).await;
    let listener = listener.with_context(|| format!("admin: cannot bind {}", worker.admin))?;
    let admin_address = listener.local_addr().with_context(|| format!("admin: {}", worker.admin))?;
    let backend = BackendOptions {
        device: worker.device,
        threads: worker.threads.map(usize::from),
        ..BackendOptions::new(worker.numerics)
    };
    let device = on_thread("cadre-open", move || OpenDevice::open(&backend)).await??;
    let process = SharedProcess::new(device, admin_address)?;
    let serving_admin = tokio::spawn(admin::serve(
        listener,
        process.metrics.clone(),
        process.readiness.clone(),
        axum::Router::new(),
    ));

    let (drain_worker, worker_told) = watch::channel(false);
    let (drain_experts, experts_told) = watch::channel(false);
    let (worker_bound, worker_address) = oneshot::channel();
    worker.shared = Some(process.clone());
    worker.bound = Some(worker_bound);
    let mut shards = Vec::new();
    let mut shard_addresses = Vec::new();
    for mut options in experts {
        let (shard_bound, address) = oneshot::channel();
        options.shared = Some(process.clone());
        options.bound = Some(shard_bound);
        let shard = options.shard;
        shard_addresses.push(async move { anyhow::Ok(ShardAddress { shard, grpc: address.await?.grpc }) });
        shards.push(keep(options, process.clone(), experts_told.clone()));
    }

    let readiness = process.readiness.clone();
    let announce = async move {
        let all = async { anyhow::Ok((worker_address.await?, try_join_all(shard_addresses).await?)) };
        // A role that fails before it listens says why itself.
        if let Ok((worker, experts)) = all.await {
            readiness.met(SharedProcess::ROLES);
            readiness.started();
            // Whoever asked may have gone; the process does not depend on it.
            let _ = bound.send(SharedAddresses { grpc: worker.grpc, admin: worker.admin, experts });
        }
        std::future::pending::<()>().await;
    };
    // The worker ends first, whatever the reason; the shards serve it to its last step.
    let worker = async {
        let ended = crate::run(worker, told(worker_told)).await;
        drain_experts.send_replace(true);
        ended
    };
    let shards = async {
        let ended = join_all(shards.into_iter().map(|shard| async {
            let ended = shard.await;
            if ended.is_err() {
                drain_worker.send_replace(true);
            }
            ended
        }));
        ended.await.into_iter().collect::<Result<()>>()
    };
    let asked = async {
        shutdown.await;
        drain_worker.send_replace(true);
        std::future::pending::<()>().await;
    };
    let (of_worker, of_shards) = tokio::select! {
        ended = async { tokio::join!(worker, shards) } => ended,
        () = async { tokio::join!(announce, asked); } => (Ok(()), Ok(())),
    };
    serving_admin.abort();
    // A shard's reason comes first: the worker that ended after it was only told to.
    of_shards.and(of_worker)
}

/// Condition of readiness of a shard: as its own last one.
const SERVING: &str = "serving";

/// Runs a shard, life after life.
async fn keep(mut options: ExpertOptions, process: SharedProcess, stop: watch::Receiver<bool>) -> Result<()> {
    let shard = options.shard;
    let name = part_name(shard);
    let mut pause = FIRST_PAUSE;
    let mut was_ready = false;
    let ours = process.readiness.part(&name, &[(SERVING, "starting")]);
    loop {
        let again = options.again();
        // Where the first life listened, the others do: workers know the address.
        let (bound, address) = oneshot::channel();
        let told_first = options.bound.replace(bound);
        let forward = async {
            let bound = address.await.ok();
            if let (Some(bound), Some(first)) = (&bound, told_first) {
                let _ = first.send(bound.clone());
            }
            bound
        };
        let live = async {
            let mut live = pin!(cadre_expert::run(options, told(stop.clone())));
            loop {
                tokio::select! {
                    ended = &mut live => break ended,
                    () = ours.wait_ready(), if !was_ready => was_ready = true,
                }
            }
        };
        let began = Instant::now();
        let (ended, bound) = tokio::join!(live, forward);
        let Err(error) = ended else { return Ok(()) };
        if *stop.borrow() || !was_ready {
            return Err(error.context(name));
        }
        pause = if began.elapsed() >= HEALTHY { FIRST_PAUSE } else { pause };
        let reason = format!("{error:#}");
        tracing::error!(shard = shard.0, error = reason, restart_in = ?pause, "an expert shard of this process has ended");
        ours.unmet(SERVING, format!("it has ended: {reason}"));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = told(stop.clone()) => return Ok(()),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        options = again;
        if let Some(bound) = bound {
            options.listen = bound.grpc;
        }
    }
}

/// Resolves once told to stop, or when whoever would tell is gone.
async fn told(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}
