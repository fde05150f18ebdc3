//! `cadre chat`: one answer, or a conversation, streamed over gRPC.
//!
//! Ctrl-C while an answer streams drops the call, which cancels it in the cluster (its pages are freed), and
//! keeps what was said so far in the history; at the prompt it ends the chat.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use cadre_proto::v1::{self, inference_client::InferenceClient};
use clap::Args;
use tokio::io::{AsyncBufReadExt, BufReader};
use tonic::transport::Channel;

use crate::client::{self, SamplingArgs};

/// Name under which the bundled checkpoint (models/pocket) is served.
const BUNDLED: &str = "pocket";

/// Talks to a running cluster.
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    /// What to say; without it, an interactive chat.
    prompt: Option<String>,
    /// The router's gRPC address.
    #[arg(long, default_value = "127.0.0.1:50051")]
    grpc: String,
    /// A system message at the start of the conversation.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub(crate) async fn run(args: ChatArgs) -> Result<()> {
    let mut client = client::connect(&args.grpc).await?;
    let model = client::served_model(&mut client).await?;
    if model.name == BUNDLED {
        eprintln!(
            "({BUNDLED} is a tiny demonstration model, 24 M parameters trained for two minutes: it knows the terms \
             of Kubernetes, Rust and this project and writes empty prose otherwise)"
        );
    }
    let mut conversation = Conversation::new(&args);
    match &args.prompt {
        Some(prompt) => conversation.say(&mut client, prompt).await.map(|_| ()),
        None => interactive(&mut client, &mut conversation).await,
    }
}

/// Reads lines until the input ends.
async fn interactive(client: &mut InferenceClient<Channel>, conversation: &mut Conversation) -> Result<()> {
    let shows_prompt = std::io::stdin().is_terminal();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        if shows_prompt {
            eprint!("> ");
        }
        let line = tokio::select! {
            line = lines.next_line() => line.context("read standard input")?,
            _ = tokio::signal::ctrl_c() => None,
        };
        match line.as_deref().map(str::trim) {
            None => return Ok(()),
            Some("") => {}
            Some(text) => {
                // A refusal (too long, queue full) ends the answer, not the chat.
                if let Err(error) = conversation.say(client, text).await {
                    eprintln!("{error:#}");
                    conversation.forget_last();
                }
            }
        }
    }
}

/// What was said.
struct Conversation {
    messages: Vec<v1::ChatMessage>,
    sampling: SamplingArgs,
}

impl Conversation {
    fn new(args: &ChatArgs) -> Self {
        let system =
            args.system.as_ref().map(|text| v1::ChatMessage { role: "system".into(), content: text.clone() });
        Self { messages: system.into_iter().collect(), sampling: args.sampling.clone() }
    }

    /// Says something, prints the answer while it comes, and remembers both.
    async fn say(&mut self, client: &mut InferenceClient<Channel>, text: &str) -> Result<()> {
        self.messages.push(client::user(text));
        let request = self.sampling.request(self.messages.clone());
        let answer = print_answer(client, request).await?;
        self.messages.push(v1::ChatMessage { role: "assistant".into(), content: answer });
        Ok(())
    }

    fn forget_last(&mut self) {
        self.messages.pop();
    }
}

/// Streams one answer to standard output; Ctrl-C cancels it. Returns the text.
pub(crate) async fn print_answer(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
) -> Result<String> {
    let mut stream = client.generate_stream(request).await.map_err(client::refused)?.into_inner();
    let mut text = String::new();
    let mut out = std::io::stdout();
    loop {
        let chunk = tokio::select! {
            chunk = stream.message() => chunk.map_err(client::refused)?,
            _ = tokio::signal::ctrl_c() => {
                eprintln!("\n(cancelled)");
                None
            }
        };
        let Some(chunk) = chunk else { break };
        out.write_all(chunk.text.as_bytes())?;
        out.flush()?;
        text.push_str(&chunk.text);
    }
    writeln!(out)?;
    Ok(text)
}
