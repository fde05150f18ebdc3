//! `cadre probe URL`: one GET, judged by its status. The image has no shell and no curl; this is what an exec probe or a
//! test pod runs there instead, and `helm test` does.
//!
//! The exit status is 0 for an answer of 2xx, 1 for any other answer or none, 2 for a URL or flag that cannot be used.
//! The body is printed either way: `/readyz` lists what is missing.

use std::{str::FromStr, time::Duration};

use anyhow::{Result, bail};
use clap::Args;
use hyper::Uri;
use tokio::time::{Instant, sleep};

use crate::{http, output};

/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// Asks an HTTP address and says by its exit status whether it answers 2xx.
#[derive(Args, Debug)]
pub(crate) struct ProbeArgs {
    /// What to ask, for instance http://HOST:PORT/PATH.
    url: Target,
    /// How long one attempt may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
    /// Ask again for so many seconds until it answers 2xx.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
    retry_for: u64,
}

/// A plain-HTTP URL.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// `host:port`.
    address: String,
    /// Path and query.
    path: String,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|error| format!("{error}"))?;
        if uri.scheme_str() != Some("http") {
            return Err("it begins with http://; there is no TLS here".to_owned());
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or("it has no host")?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Self { address: format!("{host}:{}", uri.port_u16().unwrap_or(80)), path: path.to_owned() })
    }
}

/// Runs the command.
pub(crate) async fn run(args: ProbeArgs) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(args.retry_for);
    loop {
        let failure = match attempt(&args).await {
            Ok(body) => {
                output::line(body.trim_end());
                return Ok(());
            }
            Err(failure) => failure,
        };
        // The last attempt begins before the deadline and is bounded itself.
        if Instant::now() + PAUSE >= deadline {
            return Err(failure);
        }
        sleep(PAUSE).await;
    }
}

async fn attempt(args: &ProbeArgs) -> Result<String> {
    let Target { address, path } = &args.url;
    let (status, body) = http::get_within(Duration::from_secs(args.timeout), address, path).await?;
    if !status.is_success() {
        bail!("http://{address}{path} answers {status}: {}", body.trim_end());
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_telemetry::{Metrics, Readiness, admin, axum::Router};
    use tokio::net::TcpListener;

    use super::*;

    fn target(text: &str) -> Result<(String, String), String> {
        text.parse::<Target>().map(|target| (target.address, target.path))
    }

    #[test]
    fn urls() {
        let is = |address: &str, path: &str| Ok((address.to_owned(), path.to_owned()));
        assert_eq!(target("http://a.b.svc:9090/readyz"), is("a.b.svc:9090", "/readyz"));
        assert_eq!(target("http://a"), is("a:80", "/"));
        assert_eq!(target("http://[::1]:9090/x?y=1"), is("[::1]:9090", "/x?y=1"));
        for wrong in ["https://a/", "a:9090/readyz", "/readyz", "http://", "http://a b/"] {
            target(wrong).unwrap_err();
        }
    }

    #[tokio::test]
    async fn waits_until_it_is_ready_and_says_what_is_missing() {
        let readiness = Readiness::new(&[("caches", "nothing is listed yet")]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/readyz", listener.local_addr().unwrap());
        tokio::spawn(admin::serve(listener, Metrics::new(), readiness.clone(), Router::new()));
        let probe = |retry_for| run(ProbeArgs { url: url.parse().unwrap(), timeout: 2, retry_for });

        let refused = probe(0).await.unwrap_err().to_string();
        assert!(refused.contains("503") && refused.contains("nothing is listed yet"), "{refused}");
        let waiting = tokio::spawn(probe(60));
        readiness.met("caches");
        waiting.await.unwrap().unwrap();
        probe(0).await.unwrap();
    }

    #[tokio::test]
    async fn nobody_there_is_a_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        run(ProbeArgs { url, timeout: 1, retry_for: 0 }).await.unwrap_err();
    }
}
