//! The Vercel AI SDK.

use cadre_e2e::clients::Client;

use crate::{CLUSTER, FULL, passes, url};

#[test]
fn ai_sdk() {
    passes(Client::node("ai_sdk").module(), &[url(&CLUSTER), url(&FULL.cluster)]);
}
