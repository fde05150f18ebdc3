//! Processes that are shell scripts: what the cluster does with them does not depend on what they serve.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use super::*;
use crate::up::layout::{Extra, Threads};

/// Bound on everything here; a script needs milliseconds.
const LIMIT: Duration = Duration::from_secs(60);

/// One test at a time: a file that is being written cannot be executed, and a child that another test forks
/// meanwhile holds it open for a moment.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// An "executable" in a folder of its own. `$1` is the role.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("role.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write the script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    path
}

const ANNOUNCE: &str = r#"printf '{"grpc":"127.0.0.1:1","admin":"127.0.0.1:2","http":"127.0.0.1:3","coordinator":"127.0.0.1:4"}\n'"#;

fn layout() -> Layout {
    Layout {
        prefill: 0,
        decode: 1,
        shards: 1,
        redundant_slots: 0,
        model: "/model".into(),
        weights: cadre_checkpoint::WeightsOptions::default(),
        numerics: "bf16".into(),
        device: None,
        shared: false,
        threads: Threads { worker: 1, expert: 1 },
        grpc: "127.0.0.1:0".into(),
        http: "127.0.0.1:0".into(),
        log: "warn".into(),
        drain_seconds: 10,
        secret: "/secret".into(),
        extra: Extra::default(),
    }
}

async fn next(cluster: &mut Cluster) -> Change {
    timeout(LIMIT, cluster.changed()).await.expect("a change")
}

/// Starts everything and waits until all three processes listen.
async fn started(cluster: &mut Cluster) {
    timeout(LIMIT, cluster.start()).await.expect("in time").expect("the router listens");
    while cluster.members().iter().any(|member| member.bound.is_none()) {
        next(cluster).await;
    }
}

#[tokio::test]
async fn closing_the_life_line_drains_in_order() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let journal = folder.path().join("journal");
    // Each role notes its end when its standard input has ended.
    let text = format!("{ANNOUNCE}\ncat > /dev/null\necho $1 >> {}", journal.display());
    let mut cluster = Cluster::new(layout(), script(folder.path(), &text));
    started(&mut cluster).await;
    assert_eq!(cluster.router().and_then(|bound| bound.coordinator.as_deref()), Some("127.0.0.1:4"));
    let killed = timeout(LIMIT, cluster.stop(LIMIT)).await.expect("in time");
    assert_eq!(killed, Vec::<String>::new());
    assert_eq!(fs::read_to_string(journal).expect("the journal"), "router\nworker\nexpert\n");
}

#[tokio::test]
async fn a_process_that_does_not_drain_is_killed_and_named() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!("{ANNOUNCE}\nif [ $1 = expert ]; then exec sleep 1000; fi\ncat > /dev/null");
    let mut cluster = Cluster::new(layout(), script(folder.path(), &text));
    started(&mut cluster).await;
    let pid = cluster.members()[2].bound.as_ref().map(|(pid, _)| *pid).expect("it runs");
    let killed = timeout(LIMIT, cluster.stop(Duration::from_millis(50))).await.expect("in time");
    assert!(killed.contains(&"expert 0".to_owned()), "{killed:?}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "reaped");
}

#[tokio::test]
async fn a_process_that_dies_is_named_and_started_again() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let once = folder.path().join("died-once");
    let text = format!(
        "{ANNOUNCE}\nif [ $1 = expert ] && [ ! -e {0} ]; then touch {0}; exit 3; fi\ncat > /dev/null",
        once.display()
    );
    let mut cluster = Cluster::new(layout(), script(folder.path(), &text));
    timeout(LIMIT, cluster.start()).await.expect("in time").expect("the router listens");
    let mut ended = None;
    while ended.is_none() || cluster.members().iter().any(|member| member.bound.is_none()) {
        if let Change::Ended { name, status, restart_in } = next(&mut cluster).await {
            assert!(restart_in > Duration::ZERO);
            ended = Some((name, status));
        }
    }
    assert_eq!(ended, Some(("expert 0".to_owned(), "exit status: 3".to_owned())));
    timeout(LIMIT, cluster.stop(LIMIT)).await.expect("in time");
}

#[tokio::test]
async fn a_router_that_ends_before_it_listens_fails_the_start() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::new(layout(), script(folder.path(), "exit 7"));
    let error = timeout(LIMIT, cluster.start()).await.expect("in time").expect_err("no router");
    assert_eq!(error.to_string(), "router ended (exit status: 7) before it listened");
    timeout(LIMIT, cluster.stop(LIMIT)).await.expect("in time");
}
