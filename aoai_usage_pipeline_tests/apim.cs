// A gateway for tests: the part of API Management's `context` that policies use, and an interpreter of the policy elements the project has.
// Reads one call a line from standard input and writes what came of it as one line. The expressions are `Expressions.All`, compiled beside this.
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Reflection;
using System.Reflection.Emit;
using System.Text;
using System.Threading;
using System.Xml.Linq;
using Newtonsoft.Json;
using Newtonsoft.Json.Linq;

public class PolicyError : Exception
{
    public readonly string Reason, Source_;
    public readonly int Status;

    public PolicyError(string source, string reason, int status, string message) : base(message)
    {
        Source_ = source; Reason = reason; Status = status;
    }
}

public static class Lookups
{
    public static string GetValueOrDefault(this IReadOnlyDictionary<string, string[]> values, string name, string defaultValue)
    {
        return values.ContainsKey(name) ? string.Join(",", values[name]) : defaultValue;
    }
}

public class Body
{
    public readonly byte[] Bytes;
    public readonly Func<string> Type;
    public int Reads;
    public bool Gone;

    public Body(byte[] bytes, Func<string> type) { Bytes = bytes; Type = type; }

    public T As<T>(bool preserveContent = false)
    {
        Reads++;
        if (Gone) throw new InvalidOperationException("the body was read before");
        Gone = !preserveContent;
        if (typeof(T) == typeof(byte[])) return (T)(object)Bytes.ToArray();
        var charset = Type().Split(';').Skip(1).Select(p => p.Trim()).FirstOrDefault(p => p.StartsWith("charset=", StringComparison.OrdinalIgnoreCase));
        var text = (charset == null ? Encoding.UTF8 : Encoding.GetEncoding(charset.Substring(8).Trim('"'))).GetString(Bytes);
        if (typeof(T) == typeof(string)) return (T)(object)text;
        if (typeof(T) == typeof(JObject)) return (T)(object)JObject.Parse(text);
        throw new NotSupportedException(typeof(T).FullName);
    }
}

public class Url
{
    public string Scheme = "https", Host, Path, QueryString;
    public IReadOnlyDictionary<string, string[]> Query;

    public Url(string url)
    {
        var uri = new Uri(url);
        Host = uri.Host; Path = uri.AbsolutePath; QueryString = uri.Query;
        var pairs = uri.Query.TrimStart('?').Split(new[] { '&' }, StringSplitOptions.RemoveEmptyEntries).Select(p => p.Split(new[] { '=' }, 2));
        Query = pairs.GroupBy(p => p[0]).ToDictionary(g => g.Key, g => g.Select(p => p.Length > 1 ? Uri.UnescapeDataString(p[1]) : "").ToArray());
    }
}

public class Message
{
    public Dictionary<string, string[]> HeaderMap = new Dictionary<string, string[]>(StringComparer.OrdinalIgnoreCase);
    public IReadOnlyDictionary<string, string[]> Headers { get { return HeaderMap; } }
    public Body Body;

    public void Fill(JToken given)
    {
        foreach (var header in (JObject)given["headers"] ?? new JObject()) HeaderMap[header.Key] = new[] { (string)header.Value };
        if (given["body"] != null && given["body"].Type != JTokenType.Null) Put(Convert.FromBase64String((string)given["body"]));
    }

    public void Put(byte[] bytes) { Body = new Body(bytes, () => Headers.GetValueOrDefault("Content-Type", "")); }

    public JObject Shown()
    {
        var headers = new JObject(HeaderMap.Select(h => new JProperty(h.Key, string.Join(",", h.Value))));
        return new JObject(new JProperty("headers", headers), new JProperty("body", Body == null || Body.Gone ? null : Convert.ToBase64String(Body.Bytes)));
    }
}

public class Request : Message { public string Method, IpAddress = "203.0.113.24"; public Url Url, OriginalUrl; }
public class Response : Message { public int StatusCode; public string StatusReason = ""; }
public class Named { public string Id, Name, Key, PrimaryKey, SecondaryKey; }
public class Deployment { public string ServiceName, Region, GatewayId = "managed"; }
public class LastError { public string Source, Reason, Message, Section, Scope = "api", Path = "", PolicyId = ""; }
public class Jwt { public IReadOnlyDictionary<string, string[]> Claims; public string Subject, Issuer; }

public class Context
{
    public Guid RequestId;
    public DateTime Timestamp;
    public TimeSpan Elapsed { get { return DateTime.UtcNow - Timestamp; } }
    public Named Api, Operation, Product, Subscription;
    public Deployment Deployment;
    public Request Request;
    public Response Response;
    public LastError LastError;
    public Dictionary<string, object> VariableMap = new Dictionary<string, object>();
    public IReadOnlyDictionary<string, object> Variables { get { return VariableMap; } }
}

public class Gateway
{
    static readonly Type[] Storable = {
        typeof(bool), typeof(sbyte), typeof(byte), typeof(byte[]), typeof(ushort), typeof(uint), typeof(ulong), typeof(short), typeof(int), typeof(long),
        typeof(decimal), typeof(float), typeof(double), typeof(Guid), typeof(string), typeof(char), typeof(DateTime), typeof(TimeSpan),
    };
    static readonly Dictionary<string, string> Sections = new Dictionary<string, string> {
        { "base", "inbound backend outbound on-error" }, { "choose", "inbound backend outbound on-error" },
        { "include-fragment", "inbound backend outbound on-error" }, { "set-variable", "inbound backend outbound on-error" },
        { "set-header", "inbound backend outbound on-error" }, { "set-body", "inbound backend outbound" },
        { "log-to-eventhub", "inbound backend outbound on-error" }, { "set-backend-service", "inbound backend" },
        { "set-query-parameter", "inbound backend" },
        { "authentication-managed-identity", "inbound" }, { "validate-azure-ad-token", "inbound" }, { "forward-request", "backend" },
    };

    readonly string folder;
    readonly JObject call;
    readonly Context context;
    readonly JArray events = new JArray(), failures = new JArray();
    JObject sent;
    Body answer;
    string section;

    Gateway(string folder, JObject call)
    {
        this.folder = folder; this.call = call;
        var request = new Request { Method = (string)call["method"] ?? "POST" };
        request.Url = request.OriginalUrl = new Url((string)call["url"]);
        request.Fill(call);
        context = new Context {
            RequestId = new Guid((string)call["requestId"]), Request = request,
            Timestamp = new DateTime((long)call["ticks"], (DateTimeKind)Enum.Parse(typeof(DateTimeKind), (string)call["kind"] ?? "Utc")),
            Api = Name("api"), Operation = Name("operation"), Product = Name("product"), Subscription = Name("subscription"),
            Deployment = new Deployment { ServiceName = (string)call["service"], Region = "West Europe" },
        };
        if (context.Timestamp.Kind == DateTimeKind.Local) context.Timestamp = context.Timestamp.Add(TimeZoneInfo.Local.GetUtcOffset(context.Timestamp));
        foreach (var variable in (JObject)call["variables"] ?? new JObject()) context.VariableMap[variable.Key] = ((JValue)variable.Value).Value;
    }

    Named Name(string what)
    {
        return call[what] == null || call[what].Type == JTokenType.Null ? null : new Named { Id = (string)call[what], Name = "name", Key = "CANARY-KEY", PrimaryKey = "CANARY-KEY" };
    }

    XElement Load(string name) { return XDocument.Load(Path.Combine(folder, name + ".xml")).Root; }

    object Value(string text)
    {
        var expression = text.Trim();
        if (!expression.StartsWith("__E") || !expression.EndsWith("__")) return text;
        try { return Expressions.All[int.Parse(expression.Substring(3, expression.Length - 5))](context); }
        catch (Exception e) { throw new PolicyError("expression", "ExpressionValueEvaluationFailure", 500, e.ToString()); }
    }

    void Run(IEnumerable<XElement> elements) { foreach (var element in elements) Run(element); }

    void Run(XElement element)
    {
        var kind = element.Name.LocalName;
        if (!Sections.ContainsKey(kind) || !Sections[kind].Split(' ').Contains(section)) throw new NotSupportedException("<" + kind + "> in " + section);
        Func<string, string> attribute = name => (string)element.Attribute(name);
        switch (kind)
        {
            case "base":
                var failing = call["fails"];
                if (failing != null && (string)failing["in"] == section) throw new PolicyError((string)failing["source"], (string)failing["reason"], (int)failing["status"], "refused");
                break;
            case "choose":
                var branch = element.Elements("when").FirstOrDefault(when => (bool)Value((string)when.Attribute("condition"))) ?? element.Element("otherwise");
                if (branch != null) Run(branch.Elements());
                break;
            case "include-fragment":
                Run(Load(attribute("fragment-id")).Elements());
                break;
            case "set-variable":
                var value = Value(attribute("value"));
                if (value != null && !Storable.Contains(value.GetType())) throw new NotSupportedException("a variable of type " + value.GetType());
                context.VariableMap[attribute("name")] = value;
                break;
            case "set-header":
                context.Request.HeaderMap.Remove(attribute("name"));
                if (attribute("exists-action") != "delete") context.Request.HeaderMap[attribute("name")] = element.Elements("value").Select(v => (string)Value(v.Value)).ToArray();
                break;
            case "set-body":
                context.Request.Put(Encoding.UTF8.GetBytes((string)Value(element.Value)));
                context.Request.HeaderMap["Content-Length"] = new[] { context.Request.Body.Bytes.Length.ToString(CultureInfo.InvariantCulture) };
                break;
            case "set-query-parameter":
                var kept = context.Request.Url.QueryString.TrimStart('?').Split('&').Where(p => p.Split('=')[0] != attribute("name"));
                Point(context.Request.Url.Host, "?" + string.Join("&", kept));
                break;
            case "set-backend-service":
                Point(attribute("backend-id") + ".openai.azure.com", context.Request.Url.QueryString);
                break;
            case "authentication-managed-identity":
                context.Request.HeaderMap["Authorization"] = new[] { "Bearer managed-identity for " + attribute("resource") };
                break;
            case "validate-azure-ad-token":
                var claims = call["claims"] as JObject;
                if (claims == null) throw new PolicyError(kind, "TokenSignatureInvalid", 401, "Invalid token");
                context.VariableMap[attribute("output-token-variable-name")] = new Jwt {
                    Claims = claims.Properties().ToDictionary(p => p.Name, p => new[] { (string)p.Value }),
                };
                break;
            case "log-to-eventhub":
                events.Add(new JObject(new JProperty("logger", attribute("logger-id")), new JProperty("body", (string)Value(element.Value)), new JProperty("in", section)));
                break;
            case "forward-request":
                Forward(element);
                break;
        }
    }

    void Point(string host, string query) { context.Request.Url = new Url("https://" + host + context.Request.Url.Path + query); }

    void Forward(XElement element)
    {
        sent = context.Request.Shown();
        sent["url"] = "https://" + context.Request.Url.Host + context.Request.Url.Path + context.Request.Url.QueryString;
        sent["buffered"] = (string)element.Attribute("buffer-response") != "false";
        if (context.Request.Body != null) context.Request.Body.Gone = true;
        var given = (JObject)call["backend"];
        if (given["error"] != null) throw new PolicyError("forward-request", (string)given["error"], 500, "no answer");
        context.Response = new Response { StatusCode = (int)given["status"] };
        context.Response.Fill(given);
        answer = context.Response.Body;
    }

    JObject Serve()
    {
        var policy = Load((string)call["policy"]);
        var asked = context.Request.Body;
        try
        {
            if (call["fails"] != null && (string)call["fails"]["in"] == "before") throw new PolicyError("authorization", (string)call["fails"]["reason"], 401, "refused");
            foreach (var name in new[] { "inbound", "backend", "outbound" })
            {
                section = name;
                Run(policy.Element(name).Elements());
            }
        }
        catch (PolicyError e)
        {
            failures.Add(e.Reason + " in " + section + ": " + e.Message);
            context.LastError = new LastError { Source = e.Source_, Reason = e.Reason, Message = e.Message, Section = section };
            // what context.Response is after an error is not documented for every error
            if (context.Response == null && call["noResponse"] == null)
            {
                context.Response = new Response { StatusCode = e.Status };
                context.Response.HeaderMap["Content-Type"] = new[] { "application/json" };
                context.Response.Put(Encoding.UTF8.GetBytes("{\"statusCode\": " + e.Status + ", \"message\": \"refused\"}"));
            }
            section = "on-error";
            try { Run(policy.Element("on-error").Elements()); }
            catch (PolicyError again) { failures.Add(again.Reason + " in on-error: " + again.Message); }
        }
        var response = context.Response == null ? null : context.Response.Shown();
        if (response != null) response["status"] = context.Response.StatusCode;
        return new JObject(
            new JProperty("events", events), new JProperty("failures", failures), new JProperty("sent", sent), new JProperty("response", response),
            new JProperty("requestReads", asked == null ? 0 : asked.Reads), new JProperty("responseReads", answer == null ? 0 : answer.Reads));
    }

    // Every type and member that each expression uses, as its compiled code says.
    static JArray Uses()
    {
        var codes = typeof(OpCodes).GetFields().Select(f => (OpCode)f.GetValue(null)).ToDictionary(c => c.Value);
        var uses = new SortedSet<string>(StringComparer.Ordinal);
        var flags = BindingFlags.Static | BindingFlags.Instance | BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.DeclaredOnly;
        var types = new[] { typeof(Expressions) }.Concat(typeof(Expressions).GetNestedTypes(BindingFlags.Public | BindingFlags.NonPublic));
        foreach (var method in types.SelectMany(t => t.GetMethods(flags)).Where(m => m.GetMethodBody() != null && m.Name != "Table"))
        {
            var body = method.GetMethodBody();
            foreach (var local in body.LocalVariables) uses.Add(Plain(local.LocalType) + " *");
            foreach (var clause in body.ExceptionHandlingClauses.Where(c => c.Flags == ExceptionHandlingClauseOptions.Clause)) uses.Add(Plain(clause.CatchType) + " *");
            var code = body.GetILAsByteArray();
            for (var at = 0; at < code.Length;)
            {
                short number = code[at++];
                if (number == 0xfe) number = unchecked((short)(0xfe00 | code[at++]));
                var operand = codes[number].OperandType;
                if (operand == OperandType.InlineMethod || operand == OperandType.InlineField || operand == OperandType.InlineType || operand == OperandType.InlineTok)
                {
                    var generics = method.DeclaringType.IsGenericType ? method.DeclaringType.GetGenericArguments() : null;
                    var member = method.Module.ResolveMember(BitConverter.ToInt32(code, at), generics, null);
                    uses.Add(member is Type ? Plain((Type)member) + " *" : Plain(member.DeclaringType) + " " + member.Name);
                }
                at += operand == OperandType.InlineNone ? 0 : operand == OperandType.ShortInlineBrTarget || operand == OperandType.ShortInlineI || operand == OperandType.ShortInlineVar ? 1
                    : operand == OperandType.InlineVar ? 2 : operand == OperandType.InlineI8 || operand == OperandType.InlineR ? 8
                    : operand == OperandType.InlineSwitch ? 4 + 4 * BitConverter.ToInt32(code, at) : 4;
            }
        }
        return new JArray(uses);
    }

    static string Plain(Type type)
    {
        while (type.HasElementType) type = type.GetElementType();
        return (type.IsGenericType ? type.GetGenericTypeDefinition() : type).FullName;
    }

    public static void Main(string[] arguments)
    {
        Console.OutputEncoding = new UTF8Encoding(false);
        Console.InputEncoding = new UTF8Encoding(false);
        string line;
        while ((line = Console.In.ReadLine()) != null)
        {
            JObject result;
            try
            {
                var call = JsonConvert.DeserializeObject<JObject>(line, new JsonSerializerSettings { DateParseHandling = DateParseHandling.None });
                Thread.CurrentThread.CurrentCulture = new CultureInfo((string)call["culture"] ?? "en-US");
                result = call["uses"] != null ? new JObject(new JProperty("uses", Uses())) : new Gateway(arguments[0], call).Serve();
            }
            catch (Exception e)
            {
                result = new JObject(new JProperty("broken", e.ToString()));
            }
            Console.Out.WriteLine(result.ToString(Formatting.None));
            Console.Out.Flush();
        }
    }
}
