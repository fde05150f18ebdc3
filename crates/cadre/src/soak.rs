//! `cadre soak`: continuous load that judges every answer, for tests of what a cluster does to its users.
//!
//! Streams run greedy requests one after the other and compare each text with the expected one, or with the
//! first answer to the same prompt: the text of a prompt never depends on what the cluster goes through. Failures are what it
//! measures, so nothing is retried. It needs no file and no API server: it runs from the same image as a
//! restricted pod beside the model.
//!
//! Standard output is one JSON object per line with `--json` (`start`, `progress` each second, `summary` last),
//! else lines for people. The exit status says whether more failed or differed than was allowed.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cadre_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, inference_client::InferenceClient},
};
use clap::Args;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

mod prompts;
mod report;
mod tally;

use prompts::{Prompt, Prompts};
use tally::{Outcome, Tally};

use crate::{
    client::{self, SamplingArgs},
    stop,
};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A router whose machine went away says nothing: pings find out.
const PING: Duration = Duration::from_secs(5);

/// Pause of a stream after a failure, so that an outage is not counted a thousand times a second.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the running requests may take to end when the time is over; Kubernetes kills after 30 s.
const GRACE: Duration = Duration::from_secs(25);

/// Loads a running cluster continuously and compares every answer with what it must be.
#[derive(Args, Debug)]
pub(crate) struct SoakArgs {
    /// The router's gRPC address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    grpc: String,
    /// Streams at a time, each on a connection of its own.
    #[arg(short, long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// Stop after so many seconds. [default: at SIGTERM or Ctrl-C]
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// A file with one prompt per line. [default: the prompts of --expect, else built-in ones]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// A JSON file with the text that each prompt must get: {"PROMPT": "TEXT"}. A prompt that is not in it is
    /// compared with its first answer.
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Most tokens of an answer.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    max_tokens: u32,
    /// Generate all of --max-tokens, whatever the model says.
    #[arg(long)]
    ignore_eos: bool,
    /// Seconds after which a request counts as failed.
    #[arg(long, value_name = "S", default_value_t = 120)]
    timeout: u64,
    /// How many requests may fail before the exit status says so; a text that differs is never allowed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    allow_failures: u64,
    /// Print JSON, one object per line.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) async fn run(args: SoakArgs) -> Result<()> {
    let prompts = Arc::new(Prompts::load(args.prompts.as_deref(), args.expect.as_deref())?);
    let stop = stop::requested(false)?;
    let channels = (0..args.concurrency).map(|_| channel(&args.grpc)).collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let tally = Arc::new(Mutex::new(Tally::default()));
    let (ending, ended) = watch::channel(false);
    let printer = report::Printer { json: args.json };
    printer.start(&args.grpc, args.concurrency, prompts.len())?;

    let mut streams = JoinSet::new();
    for (index, channel) in channels.into_iter().enumerate() {
        let stream = Stream {
            client: InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            prompts: Arc::clone(&prompts),
            tally: Arc::clone(&tally),
            sampling: SamplingArgs::greedy(args.max_tokens),
            ignore_eos: args.ignore_eos,
            limit: Duration::from_secs(args.timeout),
            begun,
        };
        streams.spawn(stream.run(index, ended.clone()));
    }
    drop(ended);

    let over = async {
        match args.seconds {
            Some(seconds) => sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(stop, over);
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    seconds.tick().await;
    loop {
        tokio::select! {
            _ = &mut stop => break,
            () = &mut over => break,
            _ = seconds.tick() => {
                let progress = lock(&tally).progress(begun.elapsed());
                printer.progress(&progress)?;
            }
        }
    }
    // No receiver is left only if every stream has ended, which none does by itself.
    let _ = ending.send(true);
    let finish = async { while streams.join_next().await.is_some() {} };
    let late = timeout(GRACE, finish).await.is_err();
    streams.abort_all();

    let summary = lock(&tally).summary(begun.elapsed());
    printer.summary(&summary)?;
    ensure!(!late, "requests still ran {} s after the end", GRACE.as_secs());
    ensure!(summary.ok > 0, "no request was answered");
    if summary.failed > args.allow_failures || summary.different > 0 {
        bail!(
            "{} failed ({} allowed) and {} differed",
            summary.failed,
            args.allow_failures,
            summary.different
        );
    }
    Ok(())
}

/// A connection that is made at the first request and made again after it broke.
fn channel(address: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("{address:?} is not host:port"))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .connect_lazy())
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One client: a request after the other.
struct Stream {
    client: InferenceClient<Channel>,
    prompts: Arc<Prompts>,
    tally: Arc<Mutex<Tally>>,
    sampling: SamplingArgs,
    ignore_eos: bool,
    limit: Duration,
    /// When the soak began; what times are counted from.
    begun: Instant,
}

impl Stream {
    async fn run(self, index: usize, mut ended: watch::Receiver<bool>) {
        for turn in index.. {
            if *ended.borrow() {
                return;
            }
            // Streams take turns over the prompts, so that different ones run side by side.
            let prompt = self.prompts.of_turn(turn);
            lock(&self.tally).began(self.begun.elapsed());
            let outcome = self.ask(prompt).await;
            let failed = matches!(outcome, Outcome::Failed { .. });
            lock(&self.tally).finished(self.begun.elapsed(), outcome);
            if failed {
                // Either way the loop goes on; the end is seen above.
                let _ = timeout(PAUSE, ended.changed()).await;
            }
        }
    }

    async fn ask(&self, prompt: &Prompt) -> Outcome {
        let asked = self.begun.elapsed();
        let outcome = match timeout(self.limit, self.stream(prompt)).await {
            Ok(Ok(text)) => match self.prompts.judge(prompt, &text) {
                Ok(()) => Outcome::Ok,
                Err(expected) => Outcome::Different { prompt: prompt.text.clone(), expected, text },
            },
            Ok(Err(status)) => {
                Outcome::Failed { code: format!("{:?}", status.code()), message: status.message().into() }
            }
            Err(_) => Outcome::Failed {
                code: "TimedOut".into(),
                message: format!("no end within {} s", self.limit.as_secs()),
            },
        };
        lock(&self.tally).took(self.begun.elapsed().saturating_sub(asked));
        outcome
    }

    async fn stream(&self, prompt: &Prompt) -> Result<String, tonic::Status> {
        let request = v1::GenerateRequest {
            ignore_eos: self.ignore_eos,
            ..self.sampling.request(vec![client::user(&prompt.text)])
        };
        let asked = self.begun.elapsed();
        let mut last = None;
        let mut chunks = self.client.clone().generate_stream(request).await?.into_inner();
        let mut text = String::new();
        while let Some(chunk) = chunks.message().await? {
            text.push_str(&chunk.text);
            if !chunk.tokens.is_empty() {
                let now = self.begun.elapsed();
                let mut tally = lock(&self.tally);
                match last {
                    None => tally.first_token(now, now.saturating_sub(asked)),
                    Some(before) => tally.next_token(now, now.saturating_sub(before)),
                }
                tally.tokens += chunk.tokens.len() as u64;
                last = Some(now);
            }
            if chunk.finish_reason() != v1::FinishReason::Unspecified {
                return match chunk.finish_reason() {
                    v1::FinishReason::Stop | v1::FinishReason::Length => Ok(text),
                    reason => Err(tonic::Status::aborted(format!("ended with {}", reason.as_str_name()))),
                };
            }
        }
        Err(tonic::Status::data_loss("the stream ended without its last message"))
    }
}
