#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{ModelHash, NumericsClass, PlacementEpoch};

use super::*;
use crate::coordinator::WorkerLoad;

fn entry(id: &str, role: Role, state: MemberState, sequences: u32, free: u64, report: u64) -> WorkerEntry {
    WorkerEntry {
        member: Member { id: MemberId(id.into()), role, address: "127.0.0.1:1".into(), state, pod: None },
        load: WorkerLoad {
            running_sequences: sequences,
            waiting_sequences: 0,
            free_pages: free,
            total_pages: 100,
        },
        report,
    }
}

fn table(workers: Vec<WorkerEntry>) -> Arc<WorkerTable> {
    let generation =
        Generation { model: ModelHash([1; 16]), numerics: NumericsClass::F32, epoch: PlacementEpoch(1) };
    Arc::new(WorkerTable { generation, workers })
}

fn pool(workers: Vec<WorkerEntry>) -> (watch::Sender<Arc<WorkerTable>>, WorkerPool) {
    let (sender, receiver) = watch::channel(table(workers));
    (sender, WorkerPool::new(receiver, Duration::from_secs(1)))
}

fn best(pool: &WorkerPool) -> String {
    pool.candidates(64, &[]).unwrap().decode[0].id.0.clone()
}

use MemberState::{Draining, Ready, Starting};
use Role::{Both, Decode, Prefill};

#[tokio::test]
async fn own_assignments_count_until_the_next_report_covers_them() {
    let workers =
        |report| vec![entry("a", Both, Ready, 0, 50, report), entry("b", Both, Ready, 0, 50, report)];
    let (sender, pool) = pool(workers(1));
    assert_eq!(best(&pool), "a");
    let member = pool.candidates(64, &[]).unwrap().decode[0].clone();
    let first = pool.assign_decode(&member, 64).unwrap();
    assert_eq!(best(&pool), "b", "the report still says that a is idle");
    // The next report of `a` includes the sequence; it is not counted twice.
    let mut next = workers(2);
    next[0].load.running_sequences = 1;
    next[1].load.running_sequences = 1;
    sender.send_replace(table(next));
    assert_eq!(best(&pool), "a");
    drop(first);
    assert_eq!(best(&pool), "a", "the end is known before the report");
}

#[tokio::test]
async fn pages_given_since_the_report_are_not_free() {
    let (_sender, pool) = pool(vec![entry("a", Both, Ready, 0, 10, 1), entry("b", Both, Ready, 5, 10, 1)]);
    let member = pool.candidates(64, &[]).unwrap().decode[0].clone();
    let _held = pool.assign_decode(&member, 9 * 64).unwrap();
    // `a` has one page left: enough for 64 tokens, not for 128.
    assert_eq!(pool.candidates(64, &[]).unwrap().decode[0].id.0, "a");
    assert_eq!(pool.candidates(128, &[]).unwrap().decode[0].id.0, "b");
}

#[tokio::test]
async fn only_ready_workers_and_decode_only_with_prefill() {
    let (sender, pool) = pool(vec![
        entry("starting", Both, Starting, 0, 9, 1),
        entry("draining", Both, Draining, 0, 9, 1),
        entry("decode", Decode, Ready, 0, 9, 1),
    ]);
    let error = pool.candidates(64, &[]).unwrap_err();
    assert!(error.to_string().contains("0/2 both, 1/1 decode, 0/0 prefill"), "{error}");
    assert_eq!(pool.capacity_tokens(), None);
    sender.send_replace(table(vec![
        entry("decode", Decode, Ready, 0, 9, 1),
        entry("prefill", Prefill, Ready, 0, 9, 1),
    ]));
    assert_eq!(best(&pool), "decode");
    assert_eq!(pool.capacity_tokens(), Some(6400));
}

#[tokio::test]
async fn prefill_work_is_spread_by_outstanding_tokens() {
    let (_sender, pool) =
        pool(vec![entry("p", Prefill, Ready, 0, 0, 1), entry("q", Prefill, Ready, 0, 0, 1)]);
    let first = pool.assign_prefill(1000, &[]).unwrap();
    let second = pool.assign_prefill(10, &[]).unwrap();
    let third = pool.assign_prefill(10, &[]).unwrap();
    let ids = [&first, &second, &third].map(|chosen| chosen.member.id.0.as_str());
    assert_eq!(ids, ["p", "q", "q"]);
    drop(first);
    assert_eq!(pool.assign_prefill(1, &[]).unwrap().member.id.0, "p");
    let excluded = [MemberId("p".into())];
    assert_eq!(pool.assign_prefill(1, &excluded).unwrap().member.id.0, "q");
}

#[tokio::test]
async fn a_worker_that_left_is_forgotten_and_its_assignments_end_without_effect() {
    let (sender, pool) = pool(vec![entry("a", Both, Ready, 0, 10, 1)]);
    let member = pool.candidates(64, &[]).unwrap().decode[0].clone();
    let held = pool.assign_decode(&member, 64).unwrap();
    sender.send_replace(table(Vec::new()));
    assert!(matches!(pool.candidates(64, &[]), Err(RequestError::NoWorker { .. })));
    assert!(pool.state.lock().workers.is_empty());
    // It comes back before the assignment of its earlier life ends.
    sender.send_replace(table(vec![entry("a", Both, Ready, 0, 10, 2)]));
    let again = pool.assign_decode(&member, 64).unwrap();
    drop(held);
    assert_eq!(pool.state.lock().assigned(&member.id).sequences, 1);
    drop(again);
    assert_eq!(pool.state.lock().assigned(&member.id), Assigned::default());
}

#[tokio::test]
async fn workers_that_failed_a_request_are_not_asked_again_for_it() {
    let (_sender, pool) = pool(vec![
        entry("both", Both, Ready, 0, 9, 1),
        entry("decode", Decode, Ready, 3, 9, 1),
        entry("prefill", Prefill, Ready, 0, 9, 1),
    ]);
    let ids = |excluded: &[&str]| {
        let excluded: Vec<MemberId> = excluded.iter().map(|id| MemberId((*id).into())).collect();
        let found = pool.candidates(64, &excluded);
        found.map(|found| found.decode.into_iter().map(|member| member.id.0).collect::<Vec<_>>())
    };
    assert_eq!(ids(&[]).unwrap(), ["both", "decode"]);
    assert_eq!(ids(&["both"]).unwrap(), ["decode"]);
    assert_eq!(ids(&["prefill"]).unwrap(), ["both"]);
    let error = ids(&["both", "prefill"]).unwrap_err();
    assert!(error.to_string().contains("failed this request: both, prefill"), "{error}");
}
