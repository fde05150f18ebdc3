//! Workers beside shards: one process of the shard's pod, and two members of the model.

use cadre_e2e_k8s::{Front, Model, Namespace, Operator};
use cadre_k8s_api::Tier;
use serde_json::json;

#[test]
fn a_model_serves_with_no_decode_workers_but_those_beside_its_shards() {
    Operator::installed();
    let namespace = Namespace::new("beside");
    let patch = json!({"spec": {"decode": {"replicas": 0}, "experts": {"worker": {"kvCache": "64Mi"}}}});
    let model = Model::ready(&namespace, &patch);
    Front::open(&model).assert_golden();
    let decode = model.get().expect("the model").status.and_then(|status| status.decode).expect("a status");
    assert_eq!(decode.summary, "4/4");
    assert!(model.pods("decode").expect("pods").is_empty(), "nobody else decodes");
    // A pod that goes takes a shard and a worker along, and brings both back.
    let lost = model.tier_pods(Tier::Experts)[1].clone();
    model.kill(&lost);
    model.until_replaced(&lost);
    model.until_settled();
    Front::open(&model).assert_golden();
}
