//! libFuzzer over one target, which `CADRE_FUZZ_TARGET` names: libFuzzer's own arguments leave no room for it.
//! Built by `cargo xtask fuzz` alone.

#![no_main]
#![allow(clippy::disallowed_methods, reason = "see above")]

use std::sync::LazyLock;

use cadre_fuzz::{Target, target};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("CADRE_FUZZ_TARGET").expect("CADRE_FUZZ_TARGET names a target");
    target(&name).expect("CADRE_FUZZ_TARGET names a target")
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (TARGET.run)(bytes));
