#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use cadre_telemetry::Metrics;
use serde_json::json;

use super::*;
use crate::run::{
    client::Pressure,
    lease::Renewals,
    metrics::OperatorMetrics,
    testing::{Server, api, model},
};

fn secrets() -> (Arc<Secrets>, Server) {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let (client, server) = api(&metrics, &Pressure::default(), &Renewals::default());
    (Arc::new(Secrets::new(client, "cadre".into(), "key".into())), server)
}

fn ask(secrets: &Arc<Secrets>) -> tokio::task::JoinHandle<Result<ClusterSecret, KeyError>> {
    let secrets = secrets.clone();
    tokio::spawn(async move { secrets.of(&model("10")).await })
}

const READ: &str = "GET /api/v1/namespaces/cadre/secrets/key";

/// Base64 of 32 bytes of 7.
const SEVENS: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

#[test]
fn hmac_is_that_of_the_rfc() {
    // RFC 4231, test cases 1 and 2.
    assert_eq!(
        hex(&hmac(&[0x0b; 20], b"Hi There")),
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    );
    assert_eq!(
        hex(&hmac(b"Jefe", b"what do ya want for nothing?")),
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    );
}

#[test]
fn a_secret_is_of_one_model_and_nobody_prints_it() {
    let key = Key([7; BYTES]);
    let one = key.secret("pocket", "uid-1");
    assert_eq!(one, key.secret("pocket", "uid-1"));
    assert_eq!(one.value.len(), 64);
    assert!(one.name.starts_with("pocket-cluster-") && one.name.len() <= 40 + 20, "{}", one.name);
    let other = key.secret("pocket", "uid-2");
    assert!(one.value != other.value && one.name != other.name);
    assert_ne!(one.value, Key([8; BYTES]).secret("pocket", "uid-1").value);
    assert!(!format!("{one:?}").contains(&one.value) && !one.name.contains(&one.value[..10]));
}

#[tokio::test(start_paused = true)]
async fn the_key_is_drawn_once_and_read_ever_after() {
    let (secrets, mut server) = secrets();
    let asked = ask(&secrets);
    server.expect(READ).await.fail(404, "NotFound", "no such Secret");
    let drawn = server.expect("POST /api/v1/namespaces/cadre/secrets").await;
    let made = drawn.body.clone();
    assert_eq!((made["metadata"]["name"].as_str(), made["immutable"].as_bool()), (Some("key"), Some(true)));
    drawn.ok(made.clone());
    let first = asked.await.unwrap().unwrap();
    assert_eq!(ask(&secrets).await.unwrap().unwrap(), first, "nothing is asked a second time");
    server.assert_idle();
    // An operator that starts later finds it.
    let (later, mut server) = self::secrets();
    let asked = ask(&later);
    server.expect(READ).await.ok(made);
    assert_eq!(asked.await.unwrap().unwrap(), first);
}

#[tokio::test(start_paused = true)]
async fn of_two_operators_that_draw_at_once_the_first_ones_key_counts() {
    let (secrets, mut server) = secrets();
    let asked = ask(&secrets);
    server.expect(READ).await.fail(404, "NotFound", "no such Secret");
    server.expect("POST /api/v1/namespaces/cadre/secrets").await.fail(409, "AlreadyExists", "it is there");
    server.expect(READ).await.ok(json!({"metadata": {"name": "key"}, "data": {"key": SEVENS}}));
    assert_eq!(asked.await.unwrap().unwrap(), Key([7; BYTES]).secret("m", "model-uid"));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_none_is_an_error_that_says_what_to_do() {
    let (secrets, mut server) = secrets();
    let asked = ask(&secrets);
    server.expect(READ).await.ok(json!({"metadata": {"name": "key"}, "data": {"key": "AAAA"}}));
    let error = asked.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("cadre/key") && error.contains("delete it"), "{error}");
    let asked = ask(&secrets);
    server.expect(READ).await.fail(403, "Forbidden", "secrets is forbidden");
    let error = asked.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("cadre/key") && error.contains("forbidden"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_models_secret_is_created_and_one_that_is_there_is_left() {
    let (secrets, mut server) = secrets();
    let secret = Key([7; BYTES]).secret("m", "model-uid");
    for code in [201, 409] {
        let making = {
            let (secrets, secret) = (secrets.clone(), secret.clone());
            tokio::spawn(async move { secrets.make(&model("10"), &secret).await })
        };
        let call = server.expect("POST /api/v1/namespaces/ns/secrets").await;
        assert_eq!(call.body["metadata"]["ownerReferences"][0]["uid"], "model-uid");
        assert_eq!(call.body["metadata"]["name"], secret.name.as_str());
        assert!(call.body["data"]["secret"].is_string());
        match code {
            201 => {
                let body = call.body.clone();
                call.ok(body);
            }
            _ => call.fail(409, "AlreadyExists", "it is there"),
        }
        making.await.unwrap().unwrap();
    }
}
