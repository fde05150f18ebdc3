//! The same bits from clusters of different shape, with real processes and gRPC in between.

use cadre_e2e::{Cluster, golden, grpc};
use cadre_proto::v1;

/// Sampled tokens and logprobs of every golden prompt and of a long one that is prefilled in chunks.
async fn fingerprint(cluster: &Cluster) -> Vec<Vec<v1::GeneratedToken>> {
    let mut client = grpc::connect(&cluster.grpc()).await;
    let long: Vec<u32> = (0..700).map(|position| 100 + position * 7 % 3000).collect();
    let mut requests: Vec<v1::GenerateRequest> =
        golden::all().iter().map(|golden| grpc::tokens(&golden.prompt_ids)).collect();
    requests.push(grpc::tokens(&long));
    let mut all = Vec::new();
    for mut request in requests {
        request.max_tokens = Some(24);
        request.sampling = Some(v1::SamplingOptions {
            temperature: Some(0.9),
            top_p: Some(0.95),
            seed: Some(42),
            logprobs: Some(4),
            ..v1::SamplingOptions::default()
        });
        all.push(client.generate(request).await.expect("an answer").into_inner().tokens);
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_copies_threads_and_hand_off_do_not_show_in_the_text() {
    let plain = fingerprint(&Cluster::start(&["--experts=1", "--prefill=0"])).await;
    let spread = ["--experts=7", "--redundant-slots=21", "--worker-arg=--max-step-tokens=96"];
    assert_eq!(fingerprint(&Cluster::start(&spread)).await, plain);
    let threads = ["--experts=2", "--worker-threads=2", "--expert-threads=3", "--prefill=2", "--decode=2"];
    assert_eq!(fingerprint(&Cluster::start(&threads)).await, plain);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_class_writes_the_golden_text() {
    for class in ["f32", "fp8"] {
        let cluster = Cluster::start(&["--experts=2", "--prefill=0", "--numerics", class]);
        let mut client = grpc::connect(&cluster.grpc()).await;
        let answer =
            client.generate(grpc::chat(&golden::pod().prompt)).await.expect("an answer").into_inner();
        assert_eq!(answer.text, golden::pod().greedy_text, "{class}");
    }
}
