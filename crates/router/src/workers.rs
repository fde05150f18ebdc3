//! The workers that the coordinator's view names: connections to them, and what this router has given
//! them since they last reported.
//!
//! A report is up to a second old when a request must choose; many requests in that second would all see
//! the same idle worker. So the pool counts its own assignments and takes those made since the worker's
//! last report into account. Only counts of this router matter here: two routers see each other through
//! the reports.
//!
//! Owner: one mutex around ledger and connections, held for map operations and never across an await.
//! Edges: a worker that left the view is forgotten at the next choice, its connection with it (streams in
//! flight keep theirs alive); an assignment to a forgotten worker ends without effect.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cadre_proto::{
    secret::{ClusterSecret, InternalChannel, Present},
    v1::worker_client::WorkerClient,
};
use cadre_types::{Generation, Member, MemberId, MemberState, Role};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::{
    coordinator::{WorkerEntry, WorkerTable},
    error::{RequestError, RequestResult},
    policy::{DecodeCandidate, PrefillCandidate, order_decode, pages_for, pick_prefill},
};

/// HTTP/2 keep-alive on worker connections: a peer that vanished without closing is noticed after
/// interval plus time-out, well before a stall time-out.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The pool. Clones share it.
#[derive(Clone, Debug)]
pub struct WorkerPool {
    table: watch::Receiver<Arc<WorkerTable>>,
    state: Arc<Mutex<State>>,
    /// Largest cache of a ready worker when one was last ready; 0 before that.
    last_capacity: Arc<AtomicU64>,
    connect_timeout: Duration,
    present: Present,
}

#[derive(Debug, Default)]
struct State {
    workers: BTreeMap<MemberId, Ledger>,
    /// Ledgers made so far.
    ledgers: u64,
}

#[derive(Debug, Default)]
struct Ledger {
    /// Tells this ledger from an earlier one of the same member, which may have left and come back.
    life: u64,
    channel: Option<Channel>,
    assigned: Assigned,
    /// Report that `at_report` belongs to.
    report: u64,
    /// `assigned` when that report was first seen here.
    at_report: Assigned,
}

/// Work of this router on one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Assigned {
    sequences: u64,
    pages: u64,
    prompt_tokens: u64,
}

/// Work given to a worker; taken off its account when dropped.
#[derive(Debug)]
pub struct Assignment {
    id: MemberId,
    life: u64,
    work: Assigned,
    state: Arc<Mutex<State>>,
}

impl Drop for Assignment {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        let ledger = state.workers.get_mut(&self.id).filter(|ledger| ledger.life == self.life);
        if let Some(ledger) = ledger {
            ledger.assigned.sequences -= self.work.sequences;
            ledger.assigned.pages -= self.work.pages;
            ledger.assigned.prompt_tokens -= self.work.prompt_tokens;
        }
    }
}

/// A worker chosen for one request.
#[derive(Debug)]
pub struct Chosen {
    /// The worker.
    pub member: Member,
    /// A client over the shared connection.
    pub client: WorkerClient<InternalChannel>,
    /// Its share of the work.
    pub assignment: Assignment,
}

/// Ready workers for one request.
#[derive(Debug)]
pub struct Candidates {
    /// What workers must agree with.
    pub generation: Generation,
    /// Decode workers in the order in which to ask them; at least one.
    pub decode: Vec<Member>,
}

impl WorkerPool {
    /// A pool over the coordinator's table.
    pub fn new(table: watch::Receiver<Arc<WorkerTable>>, connect_timeout: Duration) -> Self {
        let present = Present::default();
        Self { table, state: Arc::default(), last_capacity: Arc::default(), connect_timeout, present }
    }

    /// Shows workers the cluster's secret.
    #[must_use]
    pub fn with_secret(self, secret: Option<&ClusterSecret>) -> Self {
        Self { present: Present::new(secret), ..self }
    }

    /// The generation in force.
    pub fn generation(&self) -> Generation {
        self.table.borrow().generation
    }

    /// Tokens that the largest ready worker's cache holds, or did when a worker was last ready. A request
    /// without `max_tokens` is cut to it. `None` before the first one is ready.
    pub fn capacity_tokens(&self) -> Option<u64> {
        let known = match self.ready_capacity() {
            Some(capacity) => {
                self.last_capacity.store(capacity, Ordering::Relaxed);
                capacity
            }
            None => self.last_capacity.load(Ordering::Relaxed),
        };
        Some(known).filter(|known| *known > 0)
    }

    /// Resolves when the table of workers changes after this call, or never if the coordinator is gone.
    /// Call it before looking at the table.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut table = self.table.clone();
        table.mark_unchanged();
        async move {
            if table.changed().await.is_err() {
                std::future::pending().await
            }
        }
    }

    fn ready_capacity(&self) -> Option<u64> {
        let table = Arc::clone(&self.table.borrow());
        let pages = table
            .workers
            .iter()
            .filter(|entry| decodes(&entry.member, &table, &[]))
            .map(|entry| entry.load.total_pages)
            .max()?;
        Some(pages * crate::policy::PAGE_TOKENS)
    }

    /// The decode workers to ask, best first, for a sequence of so many tokens at most; without the
    /// excluded ones, which failed this request already.
    pub fn candidates(&self, total_tokens: u64, excluded: &[MemberId]) -> RequestResult<Candidates> {
        let table = Arc::clone(&self.table.borrow());
        let mut state = self.state.lock();
        state.follow(&table);
        let ready: Vec<&WorkerEntry> =
            table.workers.iter().filter(|entry| decodes(&entry.member, &table, excluded)).collect();
        let candidates = ready.iter().map(|entry| state.decode_candidate(entry)).collect();
        let order = order_decode(candidates, pages_for(total_tokens));
        drop(state);
        let decode: Vec<Member> = order
            .iter()
            .filter_map(|id| ready.iter().find(|entry| entry.member.id == *id))
            .map(|entry| entry.member.clone())
            .collect();
        if decode.is_empty() {
            return Err(RequestError::NoWorker {
                missing: missing_workers(&table).unwrap_or_else(|| {
                    let names: Vec<&str> = excluded.iter().map(|id| id.0.as_str()).collect();
                    format!("those that are ready failed this request: {}", names.join(", "))
                }),
            });
        }
        Ok(Candidates { generation: table.generation, decode })
    }

    /// Takes a decode worker for a sequence.
    pub fn assign_decode(&self, member: &Member, total_tokens: u64) -> RequestResult<Chosen> {
        let work = Assigned { sequences: 1, pages: pages_for(total_tokens), prompt_tokens: 0 };
        self.assign(member, work)
    }

    /// Chooses and takes a prefill worker for a prompt, none of the excluded ones.
    pub fn assign_prefill(&self, prompt_tokens: u64, excluded: &[MemberId]) -> RequestResult<Chosen> {
        let table = Arc::clone(&self.table.borrow());
        let member = {
            let mut state = self.state.lock();
            state.follow(&table);
            let candidates: Vec<PrefillCandidate> = table
                .workers
                .iter()
                .filter(|entry| {
                    is_ready(&entry.member, Role::Prefill) && !excluded.contains(&entry.member.id)
                })
                .map(|entry| PrefillCandidate {
                    id: entry.member.id.clone(),
                    outstanding_tokens: state.assigned(&entry.member.id).prompt_tokens,
                })
                .collect();
            let id = pick_prefill(&candidates);
            id.and_then(|id| table.workers.iter().find(|entry| entry.member.id == id))
                .map(|entry| entry.member.clone())
        };
        let member =
            member.ok_or_else(|| RequestError::NoWorker { missing: "no prefill worker is ready".into() })?;
        self.assign(&member, Assigned { sequences: 1, pages: 0, prompt_tokens })
    }

    fn assign(&self, member: &Member, work: Assigned) -> RequestResult<Chosen> {
        let mut state = self.state.lock();
        let ledger = state.ledger(&member.id);
        let life = ledger.life;
        let channel = match &ledger.channel {
            Some(channel) => channel.clone(),
            None => {
                let channel = connect(member, self.connect_timeout)?;
                ledger.channel = Some(channel.clone());
                channel
            }
        };
        ledger.assigned.sequences += work.sequences;
        ledger.assigned.pages += work.pages;
        ledger.assigned.prompt_tokens += work.prompt_tokens;
        drop(state);
        let client = WorkerClient::with_interceptor(channel, self.present.clone())
            .max_decoding_message_size(cadre_proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(cadre_proto::MAX_MESSAGE_BYTES);
        let assignment = Assignment { id: member.id.clone(), life, work, state: Arc::clone(&self.state) };
        Ok(Chosen { member: member.clone(), client, assignment })
    }
}

impl State {
    /// Forgets workers that left, and notes which reports are new.
    fn follow(&mut self, table: &WorkerTable) {
        self.workers.retain(|id, _| table.workers.iter().any(|entry| entry.member.id == *id));
        for entry in &table.workers {
            let ledger = self.ledger(&entry.member.id);
            if ledger.report != entry.report {
                ledger.report = entry.report;
                ledger.at_report = ledger.assigned;
            }
        }
    }

    fn ledger(&mut self, id: &MemberId) -> &mut Ledger {
        self.workers.entry(id.clone()).or_insert_with(|| {
            self.ledgers += 1;
            Ledger { life: self.ledgers, ..Ledger::default() }
        })
    }

    fn assigned(&self, id: &MemberId) -> Assigned {
        self.workers.get(id).map(|ledger| ledger.assigned).unwrap_or_default()
    }

    fn decode_candidate(&self, entry: &WorkerEntry) -> DecodeCandidate {
        let (now, then) = self
            .workers
            .get(&entry.member.id)
            .map(|ledger| (ledger.assigned, ledger.at_report))
            .unwrap_or_default();
        let load = &entry.load;
        let reported = u64::from(load.running_sequences) + u64::from(load.waiting_sequences);
        DecodeCandidate {
            id: entry.member.id.clone(),
            free_pages: (load.free_pages + then.pages).saturating_sub(now.pages),
            sequences: (reported + now.sequences).saturating_sub(then.sequences),
        }
    }
}

fn is_ready(member: &Member, role: Role) -> bool {
    member.state == MemberState::Ready && member.role == role
}

/// Whether a worker can generate now: a `both` worker alone, a `decode` worker if any can prefill. None of
/// the excluded ones counts.
fn decodes(member: &Member, table: &WorkerTable, excluded: &[MemberId]) -> bool {
    let prefills = || {
        table
            .workers
            .iter()
            .any(|entry| is_ready(&entry.member, Role::Prefill) && !excluded.contains(&entry.member.id))
    };
    !excluded.contains(&member.id)
        && (is_ready(member, Role::Both) || (is_ready(member, Role::Decode) && prefills()))
}

/// What keeps requests from being served, or nothing.
pub(crate) fn missing_workers(table: &WorkerTable) -> Option<String> {
    if table.workers.iter().any(|entry| decodes(&entry.member, table, &[])) {
        return None;
    }
    let count = |role| table.workers.iter().filter(|entry| entry.member.role == role).count();
    let ready = |role| table.workers.iter().filter(|entry| is_ready(&entry.member, role)).count();
    let part = |name, role| format!("{}/{} {name}", ready(role), count(role));
    Some(format!(
        "ready workers: {}, {}, {}; one of role both, or one decode and one prefill, is needed",
        part("both", Role::Both),
        part("decode", Role::Decode),
        part("prefill", Role::Prefill)
    ))
}

fn connect(member: &Member, connect_timeout: Duration) -> RequestResult<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", member.address)).map_err(|error| {
        RequestError::WorkerFailed {
            worker: member.id.clone(),
            operation: "connect",
            problem: format!("address {:?}: {error}", member.address),
        }
    })?;
    Ok(endpoint
        .connect_timeout(connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

#[cfg(test)]
mod tests;
