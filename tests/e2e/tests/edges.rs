//! What whole processes do at their edges: no descriptors left, peers that say nothing or read nothing, files that do not
//! answer, files that differ.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use cadre_e2e::{Cluster, checkpoints, golden, grpc, http, process, role::RoleProcess, wait};
use cadre_proto::v1::{self, expert_client::ExpertClient};
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;

const ANY: &str = "127.0.0.1:0";

/// A process of every role with the port that its peers or clients use.
fn doors(cluster: &Cluster) -> Vec<(&'static str, u32, String)> {
    let router = cluster.member("router");
    let of = |name: &'static str| {
        let member = cluster.member(name);
        [(name, member.pid, member.grpc), (name, member.pid, member.admin)]
    };
    let mut doors = vec![
        ("router, HTTP", router.pid, cluster.http()),
        ("router, gRPC", router.pid, cluster.grpc()),
        ("router, coordinator", router.pid, cluster.coordinator()),
        ("router, admin", router.pid, router.admin),
    ];
    doors.extend(["prefill 0", "decode 0", "expert 0"].into_iter().flat_map(of));
    doors
}

/// An HTTP/2 preface with empty settings: every gRPC server answers it with its own.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Whether a server says something on a new connection.
fn answers(address: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    stream.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    stream.write_all(PREFACE).is_ok() && stream.read(&mut [0; 1]).is_ok_and(|bytes| bytes > 0)
}

#[test]
fn a_process_without_descriptors_waits_and_serves_again_when_it_has_some() {
    let cluster = Cluster::start(&["--experts=1"]);
    for (door, pid, address) in doors(&cluster) {
        wait::until(&format!("{door} answers"), || answers(&address).then_some(()));
        let limit = process::descriptor_limit(pid);
        wait::until(&format!("{door} has no descriptor left"), || {
            // Connections of the looks before close meanwhile.
            process::limit_descriptors(pid, &process::next_descriptor(pid).to_string());
            (!answers(&address)).then_some(())
        });
        // More that wait to be accepted than one look takes.
        let waiting: Vec<TcpStream> =
            (0..16).map(|_| TcpStream::connect(&address).expect("the kernel takes it")).collect();
        let load = process::load(pid, Duration::from_secs(2));
        assert!(load < 0.3, "{door} takes {load:.2} of a core while it cannot accept");
        drop(waiting);
        process::limit_descriptors(pid, &limit);
        wait::until(&format!("{door} answers again"), || answers(&address).then_some(()));
    }
}

#[test]
fn who_says_nothing_is_hung_up_on_by_every_port_of_every_role() {
    let cluster = Cluster::start(&["--experts=1"]);
    let begun = Instant::now();
    let silent: Vec<(&str, TcpStream)> = doors(&cluster)
        .into_iter()
        .map(|(door, _, address)| (door, TcpStream::connect(address).expect("a connection")))
        .collect();
    for (door, mut stream) in silent {
        stream.set_read_timeout(Some(wait::LIMIT)).expect("a time-out");
        // A server may say hello first (HTTP/2's settings); what counts is that it ends.
        let mut said = Vec::new();
        let ended = stream.read_to_end(&mut said);
        let hung_up = ended.is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(hung_up, "{door} still listens after {:?}", begun.elapsed());
    }
    assert!(
        begun.elapsed() >= Duration::from_secs(15),
        "nobody is hung up on at once: {:?}",
        begun.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_reads_no_answers_costs_a_shard_a_bounded_share_of_memory() {
    let cluster = Cluster::start(&["--experts=1", "--redundant-slots=0"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    let models = client.list_models(v1::ListModelsRequest {}).await.expect("models").into_inner().models;
    let generation = models[0].generation.clone().expect("a stamp");
    let shard = cluster.member("expert 0");
    let before = process::resident(shard.pid);
    // 128 rows of 512 bytes through 32 experts: 2 MiB of answer for 64 KiB of frame, 256 frames: 512 MiB of answers.
    let (tokens, experts) = (128_u32, 32_u32);
    let frame = move |sequence: u64| v1::DispatchFrame {
        sequence,
        generation: Some(generation.clone()),
        layer: 1,
        num_tokens: tokens,
        dtype: v1::Dtype::Bf16.into(),
        activations: vec![0; 512 * tokens as usize].into(),
        scales: Vec::new().into(),
        pair_tokens: (0..experts).flat_map(|_| 0..tokens).collect(),
        pair_slots: (0..experts).flat_map(|slot| vec![slot; tokens as usize]).collect(),
    };
    let mut unread = Vec::new();
    for _ in 0..4 {
        let channel = Endpoint::from_shared(format!("http://{}", shard.grpc))
            .expect("an address")
            .initial_stream_window_size(64 << 10)
            .initial_connection_window_size(64 << 10)
            .connect()
            .await
            .expect("a connection");
        let mut client = ExpertClient::with_interceptor(channel, cluster.present());
        let frame = frame.clone();
        let frames = tokio_stream::iter(1..=64).map(frame).chain(tokio_stream::pending());
        unread.push(client.dispatch(frames).await.expect("a stream").into_inner());
    }
    let mut most = 0;
    let begun = Instant::now();
    // The streams end after 10 s in which nothing was read; looked at for longer, for the machine may be busy.
    while begun.elapsed() < Duration::from_secs(20) {
        most = most.max(process::resident(shard.pid));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let grown = most.saturating_sub(before) >> 20;
    eprintln!("a shard grew by {grown} MiB while 512 MiB of answers were not read");
    assert!(grown < 160, "the shard grew from {} MiB by {grown} MiB", before >> 20);
    // They were cut, and the shard serves.
    for mut stream in unread {
        let ended = async { while let Ok(Some(_)) = stream.message().await {} };
        tokio::time::timeout(wait::LIMIT, ended).await.expect("the stream ends");
    }
    let answer = client.generate(grpc::chat("What is a Pod?")).await.expect("an answer").into_inner();
    assert_eq!(answer.text, golden::pod().greedy_text);
}

/// The first file of weights.
fn weights(folder: &Path) -> String {
    let names = fs::read_dir(folder).expect("the copy").filter_map(Result::ok);
    let mut names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names.into_iter().find(|name| name.ends_with(".safetensors")).expect("weights")
}

/// Puts a pipe that nobody writes to in a file's place: who opens it waits for ever.
fn pipe(folder: &Path, file: &str) {
    let path = folder.join(file);
    fs::remove_file(&path).expect(file);
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo starts").success());
}

#[test]
fn a_role_that_is_stuck_in_its_files_ends_when_it_is_told_to() {
    for role in ["router", "worker", "expert"] {
        let folder = checkpoints::copy();
        // What is no regular file is refused by name where weights are read; text files are opened, as a disk that does
        // not answer is.
        let of_role = match role {
            "router" => vec![
                "config.json".to_owned(),
                "tokenizer.json".to_owned(),
                "tokenizer_config.json".to_owned(),
            ],
            _ => vec!["config.json".to_owned(), weights(folder.path())],
        };
        for file in of_role {
            let folder = checkpoints::copy();
            pipe(folder.path(), &file);
            let model = folder.path().to_str().expect("UTF-8").to_owned();
            let mut args = vec!["--model", &model];
            match role {
                "router" => args.extend(["--grpc", ANY, "--http", ANY, "--coordinator", ANY, "--admin", ANY]),
                "worker" => args.extend(["--coordinator", "127.0.0.1:9", "--role", "both"]),
                _ => args.extend(["--coordinator", "127.0.0.1:9", "--shard", "0"]),
            }
            let mut process = RoleProcess::spawn(role, &args, &[]);
            let is_stuck = wait::until(&format!("{role} opens {file} or ends"), || {
                let is_stuck = process::is_stuck_in_open(&model);
                (is_stuck || process.has_ended()).then_some(is_stuck)
            });
            assert_eq!(is_stuck, file.starts_with("tokenizer"), "{role}, {file}\n{}", process.log());
            if is_stuck {
                process.signal("TERM");
            }
            let begun = Instant::now();
            let status = process.wait();
            eprintln!("{role}, {file}: stuck {is_stuck}, ended after {:?}: {status}", begun.elapsed());
            if !is_stuck {
                assert!(
                    !status.success() && process.log().contains("not a regular file"),
                    "{}",
                    process.log()
                );
            }
        }
    }
}

#[test]
fn up_ends_a_process_that_is_stuck_in_its_files() {
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let folder = checkpoints::copy();
        pipe(folder.path(), file);
        let model = folder.path().to_str().expect("UTF-8").to_owned();
        let mut cluster = Cluster::spawn(&["--model", &model, "--experts=1"]);
        wait::until(&format!("somebody opens {file}"), || process::is_stuck_in_open(&model).then_some(()));
        let begun = Instant::now();
        let status = cluster.interrupt();
        eprintln!("up, stuck in {file}, ended after {:?}: {status}", begun.elapsed());
        wait::until("nobody is left", || (!process::is_stuck_in_open(&model)).then_some(()));
        for (pid, name) in cluster.pids() {
            wait::until(&format!("{name} is gone"), || (!process::runs(pid)).then_some(()));
        }
    }
}

/// A tensor of an expert; its first bytes lie in no page that the model hash samples (the test would say so).
const TENSOR: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_that_are_changed_in_place_are_refused_by_name_when_a_shard_comes_back() {
    let folder = checkpoints::copy();
    let cluster = Cluster::start_over(folder.path(), &["--experts=2", "--redundant-slots=32"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    checkpoints::overwrite(folder.path(), TENSOR, &[0x40, 0x41, 0x42, 0x43]);
    // Both hold a copy of the expert; the one that goes reads what is there now.
    process::signal(cluster.member("expert 1").pid, "KILL");
    let words = "their files differ or were changed in place";
    wait::until("the refusal is logged", || cluster.log().contains(words).then_some(()));
    let log = cluster.log();
    assert!(log.contains("expert 3 of layer 1"), "the expert is named:\n{log}");
    let answer = client.generate(grpc::chat("What is a Pod?")).await.expect("the other copies serve");
    assert_eq!(answer.into_inner().text, golden::pod().greedy_text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_a_checkpoint_that_differ_are_refused_by_name() {
    let (first, second) = (checkpoints::copy(), checkpoints::copy());
    checkpoints::overwrite(second.path(), TENSOR, &[0x40, 0x41, 0x42, 0x43]);
    let [first, second] = [&first, &second].map(|folder| folder.path().to_str().expect("UTF-8").to_owned());
    let ports = ["--grpc", ANY, "--http", ANY, "--coordinator", ANY, "--admin", ANY];
    let layout = ["--shards", "2", "--redundant-slots", "32", "--model", &first];
    let router = RoleProcess::start("router", &[&ports[..], &layout].concat());
    let coordinator = router.address("coordinator").to_owned();
    let shard = |index: &str, model: &str| {
        RoleProcess::start(
            "expert",
            &["--coordinator", &coordinator, "--shard", index, "--threads", "1", "--model", model],
        )
    };
    let kept = shard("0", &first);
    let ready = async || {
        let ready = http::metric(router.address("admin"), "cadre_router_members", &["expert", "ready"]).await;
        (ready >= 1.0).then_some(())
    };
    wait::until_async("the first shard is ready", ready).await;
    let mut other = shard("1", &second);
    assert!(!other.wait().success());
    let message = other.termination_message().expect("a termination message");
    assert!(message.contains("their files differ or were changed in place"), "{message}");
    assert!(message.contains("expert 3 of layer 1"), "{message}");
    let refused =
        http::metric(router.address("admin"), "cadre_router_members_refused_total", &["digest"]).await;
    assert!(refused >= 1.0);
    drop(kept);
}

/// Any member may say what it has applied; what no coordinator of this model plans costs nobody anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_with_sixty_thousand_shards_is_refused_and_leaves_nothing_behind() {
    const SHARDS: usize = 60_004;
    let cluster = Cluster::start(&["--experts=2"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    let models = client.list_models(v1::ListModelsRequest {}).await.expect("models").into_inner().models;
    let generation = models[0].generation.clone().expect("a stamp");
    let workers = ["prefill 0", "decode 0"].map(|name| cluster.member(name));
    let before: Vec<u64> = workers.iter().map(|worker| process::resident(worker.pid)).collect();
    let shards = (0..SHARDS).map(|shard| v1::ShardSlots { experts: vec![(shard % 32) as u32] }).collect();
    let placement =
        v1::Placement { epoch: 9, num_experts: 32, layers: vec![v1::LayerPlacement { layer: 1, shards }] };
    let report = v1::Report {
        member: Some(v1::Member {
            id: "stranger".into(),
            role: v1::Role::Decode.into(),
            address: "127.0.0.1:9".into(),
            state: v1::MemberState::Starting.into(),
            ..v1::Member::default()
        }),
        generation: Some(v1::Generation { epoch: 9, ..generation }),
        placement_digest: 7,
        applied_placement: Some(placement),
        ..v1::Report::default()
    };
    let channel = Endpoint::from_shared(format!("http://{}", cluster.coordinator()))
        .expect("an address")
        .connect()
        .await
        .expect("a connection");
    let mut coordinator =
        v1::coordinator_client::CoordinatorClient::with_interceptor(channel, cluster.present());
    let reports = tokio_stream::once(report).chain(tokio_stream::pending());
    let refused = coordinator.watch(reports).await.expect_err("no coordinator plans that");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    for (worker, before) in workers.iter().zip(before) {
        let grown = process::resident(worker.pid).saturating_sub(before) >> 20;
        let page = http::get(&worker.admin, "/metrics").await.body.len() >> 10;
        let load = process::load(worker.pid, Duration::from_secs(2));
        eprintln!(
            "a worker grew by {grown} MiB, its metrics have {page} KiB, idle it takes {load:.3} of a core"
        );
        assert!(grown < 32 && page < 1024 && load < 0.1, "{grown} MiB, {page} KiB, {load:.3}");
    }
}

#[test]
fn a_header_of_more_tensors_than_a_file_can_have_is_refused_before_it_is_read_whole() {
    let folder = checkpoints::copy();
    let tensor = |at| format!(r#""t{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let header = format!("{{{}}}", (0..1_500_000).map(tensor).collect::<Vec<_>>().join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    fs::write(folder.path().join(weights(folder.path())), &file).expect("the file");
    let begun = Instant::now();
    let mut inspect = Command::new(cadre_e2e::binary::cadre())
        .arg("inspect")
        .arg(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("cadre starts");
    let mut most = 0;
    let status = wait::until("inspect ends", || {
        most = most.max(process::peak(inspect.id()));
        inspect.try_wait().expect("our child")
    });
    let mut words = String::new();
    inspect.stderr.take().expect("piped").read_to_string(&mut words).expect("text");
    inspect.stdout.take().expect("piped").read_to_string(&mut words).expect("text");
    eprintln!(
        "{} MB of header refused after {:?} with {} MiB",
        file.len() / 1_000_000,
        begun.elapsed(),
        most >> 20
    );
    assert!(!status.success());
    assert!(words.contains("at most"), "{words}");
    // The pages of the file itself are among them.
    assert!(most < 400 << 20, "{} MiB", most >> 20);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

/// docs/operations.md names a test for every wait: each of them is there.
#[test]
fn the_tests_that_hold_the_bounds_of_waits_exist() {
    let root = cadre_e2e::binary::root();
    let page = fs::read_to_string(root.join("docs/operations.md")).expect("the page");
    let table = page.split("## What every wait is bounded by").nth(1).expect("the section");
    let table = table.split("\n## ").next().expect("its text");
    let named: Vec<(&str, &str)> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| who"))
        .filter_map(|line| {
            line.trim_end_matches(" |").rsplit("| ").next()?.trim_matches('`').split_once(": ")
        })
        .collect();
    assert!(named.len() > 25, "{named:?}");
    for (place, test) in named {
        let folder = if place == "e2e" { root.join("tests/e2e") } else { root.join("crates").join(place) };
        let found = Command::new("grep")
            .args(["-rqE", "--include=*.rs", &format!("fn {test}\\b")])
            .arg(&folder)
            .status()
            .expect("grep starts");
        assert!(found.success(), "no test {test} under {}", folder.display());
    }
}
